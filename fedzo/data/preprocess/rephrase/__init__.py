"""OAT-Rephrase: training text rewritten at the client by a language model, behind checks and a judge.

A row's way: original text -> rewriter -> checks -> judge -> rewritten text; a row that fails anywhere on it keeps its
text. Source: arXiv 2506.17264; where that is silent, the defaults are ours and say so.
"""

from fedzo.data.preprocess.rephrase import openai_compatible

__all__ = ["openai_compatible"]
