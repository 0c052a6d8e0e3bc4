"""The GenEval judge: which objects an image shows, how many, where, and in which colours.

May import the light files of `scorers`, and its trunks once a model is loaded. `detector` and `colours` load torch.
"""
