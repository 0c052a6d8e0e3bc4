"""Published weights to safetensors with the names of transformers, without ever running code of a pickle.

May import `pipelines.dataset`; torch is loaded when a file is read.
"""
