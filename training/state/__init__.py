"""The state of a training: ZeRO fragments, float32 masters, the moving average, checkpoints, the parent of a round.

May import the configuration and `pipelines.dataset`.
"""
