"""Text in, text out: a run opened once, its tokenizer, templates and defaults around `generate.stream`."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from moejax import axes
from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.data import StreamDecoder
from moejax.data.tokenizer import Tokenizer
from moejax.evals import chat
from moejax.evals.generate import Stats, prepare, stream
from moejax.interop import prompts as prompt_files
from moejax.mesh import parse_mesh
from moejax.runs import folder
from moejax.runs.open import load_run, read_config
from moejax.sharding import Layout, make_layout

MAX_NEW = 200


class StoppingText:
    """Ids in, text out, up to the first of some texts; what may be the start of one is held back.

    Attributes:
      stopped: one of the texts has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()):
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer)
        self._stop_texts = [s for s in stop_texts if s]
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._pass(self._decoder.push(ids))

    def flush(self) -> str:
        """What is left at the end."""
        text = self._pass(self._decoder.flush()) + self._held
        self._held = ""
        return "" if self.stopped else text

    def _pass(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for s in self._stop_texts if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, s) for s in self._stop_texts), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def _check_ids(stop_ids: Sequence[int], vocab_size: int) -> None:
    outside = [i for i in stop_ids if not 0 <= i < vocab_size]
    if outside:
        raise ConfigError(
            f"stop_ids: {outside[0]} is not a token id; they go from 0 to {vocab_size - 1}"
        )


def mesh_layout(cfg: ExperimentConfig, text: str) -> Layout | None:
    """The layout of 'tensor=2,expert=4' for generating with a run's model.

    Raises ConfigError for a bad text, too few devices, or a model that does not divide.
    """
    asked = parse_mesh(text)
    sizes = {axis: getattr(asked, axis) for axis in axes.MESH_AXES}
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    cfg = dataclasses.replace(
        cfg,
        mesh=MeshConfig(**sizes, rules=cfg.mesh.rules),
        # Rows are filled up to whatever divides: the run's own batch does not matter.
        data=dataclasses.replace(cfg.data, batch_size=rows),
        train=dataclasses.replace(cfg.train, accumulation=1),
    )
    return make_layout(cfg, jax.devices())


class Writer:
    """A run that continues prompts, always in the same way.

    Args:
      workdir: of the run, trained or imported.
      mesh: 'tensor=2,expert=4', or None for one device.
      max_new: tokens per prompt; None: what generation_config.json says, or 200, and no more than fit.
      temperature, top_k, top_p: None: what generation_config.json says, or `prompt_files.DEFAULTS`.
      seed: see `generate.stream`.
      stop_texts: a continuation ends before the first of these.
      stop_ids: token ids that end it, besides the tokenizer's and generation_config.json's.
      speculative_decoding: see `generate.stream`.

    Attributes:
      stats: of everything written so far.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        mesh: str | None = None,
        max_new: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_texts: Sequence[str] = (),
        stop_ids: tuple[int, ...] = (),
        speculative_decoding: bool = False,
    ):
        experiment = read_config(workdir)
        self.files = prompt_files.read_prompt_files(workdir / folder.HF)
        layout = None if mesh is None else mesh_layout(experiment, mesh)
        run = load_run(workdir, layout)
        self.tokenizer, self.cfg = run.tokenizer, run.cfg.model
        _check_ids(stop_ids, self.cfg.vocab_size)
        self.stats = Stats()
        self._model = prepare(run.params, self.cfg, layout), run.router_state
        self._max_new, self._stop_texts = max_new, stop_texts
        self._ends = (*prompt_files.stop_ids(self.files, self.tokenizer), *stop_ids)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._options: dict[str, Any] = dict(
            **prompt_files.sampling_options(
                given, self.files.generation_config, self.cfg.vocab_size
            ),
            seed=seed,
            stop_ids=self._ends,
            speculative_decoding=speculative_decoding,
            layout=layout,
            stats=self.stats,
        )

    def encode(self, request: str | list[chat.Message]) -> list[int]:
        """Token ids of a text to continue, or of a conversation to answer."""
        if isinstance(request, str):
            return prompt_files.encode_prompt(self.files, request, self.tokenizer)
        return chat.encode_chat(self.files, request, self.tokenizer)

    def write(self, prompt: list[int]) -> Iterator[str]:
        """Pieces of the continuation as they come."""
        for (piece,) in self._pieces([prompt], 0):
            if piece:
                yield piece

    def write_all(self, prompts: list[list[int]], first_row: int = 0) -> list[str]:
        """The whole continuation of each prompt; `first_row` as for `generate.stream`."""
        texts = [""] * len(prompts)
        for pieces in self._pieces(prompts, first_row):
            texts = [text + piece for text, piece in zip(texts, pieces)]
        return texts

    def _pieces(self, prompts, first_row: int) -> Iterator[list[str]]:
        rows = [StoppingText(self.tokenizer, self._stop_texts) for _ in prompts]
        max_new = self._max_new
        if max_new is None:
            usual = self.files.generation_config.get("max_new_tokens") or MAX_NEW
            room = self.cfg.max_seq_len - max(map(len, prompts))
            # Without room, one token more is asked for, so that `stream` says what does not fit.
            max_new = max(min(usual, room), 1)
        for new in stream(
            *self._model,
            self.cfg,
            prompts,
            max_new,
            first_row=first_row,
            stop=lambda row: rows[row].stopped,
            **self._options,
        ):
            yield [row.push(i for i in ids if i not in self._ends) for row, ids in zip(rows, new)]
        yield [row.flush() for row in rows]
