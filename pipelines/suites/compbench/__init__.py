"""The parts of T2I-CompBench++ that follow from detected objects: spatial relations, numbers, complex prompts.

May import numpy, `pipelines.suites.questions` and nothing else; the container of infra/compbench runs these files too.
"""
