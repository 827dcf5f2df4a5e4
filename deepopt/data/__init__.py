"""Byte corpora: the sources of Python's standard library, which every machine has, and your files.

A corpus is bytes, split into a training and a held-out part. Batches are functions of the seed and
the step alone, so that a run that resumes needs no sampler state.
"""

from deepopt.data.corpus import Corpus, load_corpus, stdlib_corpus
from deepopt.data.sampling import evaluation_batches, sample_batch

__all__ = ["Corpus", "evaluation_batches", "load_corpus", "sample_batch", "stdlib_corpus"]
