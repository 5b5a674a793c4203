"""One model over several GPUs (tensor parallelism, Shoeybi et al., Megatron-LM, 2019): one engine, several ranks.

Rank 0 is the engine's process, with the scheduler, the queue and the pages. The others are its children: each holds its
share of the weights and of the pages' heads, and runs whatever rank 0 runs, told as arrays.

Used by the processes of engines alone; may import what `batchrun.engine` may.
"""
