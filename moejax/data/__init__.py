"""Text to batches: sources -> corpus -> tokenizer -> packed, shuffled, mixed, resumable batches."""

from moejax.data.corpus import Corpus, load_corpus
from moejax.data.decoding import StreamDecoder
from moejax.data.pipeline import synthetic_batch, train_iterator, validation_batches
from moejax.data.sources import DataError, Document
from moejax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "DataError",
    "Document",
    "StreamDecoder",
    "Tokenizer",
    "load_corpus",
    "load_tokenizer",
    "synthetic_batch",
    "train_iterator",
    "validation_batches",
]
