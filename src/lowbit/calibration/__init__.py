"""Turns text and chats into token ids, for calibration and for evaluation.

sources.py reads named data sets and local files. tokens.py calls the tokenizer, and hashes the
documents and the tokenizer. windows.py draws the calibration windows and caches them. packing.py
cuts windows for training, which do not overlap. token_ids.py takes windows that the caller has
tokenized. evaluation.py prepares the text that perplexity is measured on. Besides eval/tasks.py,
only this package imports `datasets`.
"""

from lowbit.calibration.evaluation import evaluation_documents, evaluation_text
from lowbit.calibration.token_ids import TokenIds, chosen_calibration
from lowbit.calibration.windows import Calibration, TokenWindows, token_windows

__all__ = [
    "Calibration",
    "TokenIds",
    "TokenWindows",
    "chosen_calibration",
    "evaluation_documents",
    "evaluation_text",
    "token_windows",
]
