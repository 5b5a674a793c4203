"""Staged chunks, sealed parts, the manifest: every key of an output, and the protocol that makes it exact.

Used by workers, which write parts, by the driver, which writes the rest, and by the commands, which read them. May
import dataset, job and storage; knows no engine, no model and no prompt.
"""
