"""What a job will cost before it is run: a sample of its rows, a short trial, and what earlier runs took.

Used by `plan --trial` and `bench`, in the process that the user started; a trial's engine is a process of its own. May
import the driver's preparation and what is below it.
"""
