"""Continues text with a run: its tokenizer, chat template and defaults around `generate.stream`."""

import dataclasses
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from moejax import axes
from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.data import StreamDecoder, load_tokenizer
from moejax.data.tokenizer import Tokenizer
from moejax.evals import chat
from moejax.evals.generate import Stats, check_prompt, prepare, stream
from moejax.evals.intervene_text import Intervention, changed_run, check_all, check_alone
from moejax.evals.trace_replay import told
from moejax.interop import prompts as prompt_files
from moejax.mesh import parse_mesh
from moejax.runs import folder
from moejax.runs.open import load_run, read_config
from moejax.sharding import Layout, make_layout
from moejax.text import shown

Request = str | list[chat.Message]


class StoppingText:
    """Turns ids into text, up to the first stop text. An ending that could begin a stop text is held back.

    Attributes:
      stopped: a stop text was found.
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
        """The rest of the text, at the end."""
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
    """Length of the longest ending of `text` that is a beginning of `stop`."""
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
        # Batches are padded to a number of rows that divides, so the run's own batch size does not matter.
        data=dataclasses.replace(cfg.data, batch_size=rows),
        train=dataclasses.replace(cfg.train, accumulation=1),
    )
    return make_layout(cfg, jax.devices())


class Writer:
    """Opens a run, and continues prompts with one set of options.

    Args:
      workdir: of the run, trained or imported.
      mesh: 'tensor=2,expert=4', or None for one device.
      step: of the checkpoint; None: the newest.
      dtype: to compute in; None: the run's `compute.dtype`.
      interventions: what is changed about the model; those that look at a text cannot be.
      max_new: tokens per prompt. None: the value in generation_config.json, or 200, but no more than fit.
      temperature, top_k, top_p: None: the value in generation_config.json, or in `prompt_files.DEFAULTS`.
      seed: see `generate.stream`.
      stop_texts: a continuation ends before the first of these.
      stop_ids: token ids that end it, besides those of the tokenizer and the checkpoint's files.
      speculative_decoding: see `generate.stream`.
      replay: a trace of one text (`moejax routes`): tokens take its routes. The continuation ends with it,
        or where it says something else.

    Attributes:
      run: the opened run, its parameters prepared for decoding.
      stats: measurements of everything written so far.
      left: with `replay`, the position of the first token that is not the trace's, or None.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        mesh: str | None = None,
        step: int | None = None,
        dtype: str | None = None,
        interventions: Sequence[Intervention] = (),
        max_new: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_texts: Sequence[str] = (),
        stop_ids: tuple[int, ...] = (),
        speculative_decoding: bool = False,
        replay: pathlib.Path | None = None,
    ):
        experiment = read_config(workdir)
        check_alone(interventions)
        check_all(interventions, experiment.model)
        self.files = prompt_files.read_prompt_files(workdir / folder.HF)
        layout = None if mesh is None else mesh_layout(experiment, mesh)
        self._told, self.left = None, None
        if replay is not None:
            tokenizer = load_tokenizer(experiment.data, None, workdir / folder.TOKENIZER)
            self._told = told(replay, experiment.model, tokenizer)
        run = changed_run(load_run(workdir, layout, step, dtype), interventions)
        self.tokenizer, self.cfg = run.tokenizer, run.cfg.model
        _check_ids(stop_ids, self.cfg.vocab_size)
        self.stats = Stats()
        params = prepare(run.params, run.cfg.compute.dtype, layout)
        self.run = run._replace(params=params)
        if self._told is not None:
            self.run = self.run._replace(router_state=self._told.with_state(run.router_state))
        published = self.files.generation
        self._max_new = max_new
        self._stop_texts = (*stop_texts, *prompt_files.several(published, "stop_strings"))
        ends = prompt_files.stop_ids(self.files, self.tokenizer, self._stop_texts)
        self._ends = (*ends, *stop_ids)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._options: dict[str, Any] = dict(
            **prompt_files.sampling_options(given, published, self.cfg.vocab_size),
            compute=run.cfg.compute,
            seed=seed,
            stop_ids=self._ends,
            speculative_decoding=speculative_decoding,
            layout=layout,
            stats=self.stats,
        )

    def encode(self, request: Request) -> list[int]:
        """Token ids of a text to continue, or of a conversation to answer.

        Raises ConfigError if it has no tokens, or leaves no room for the continuation. Warns about
        characters that the vocabulary cannot express.
        """
        said = [request] if isinstance(request, str) else [m["content"] for m in request]
        if not self.tokenizer.lossless:
            unknown = sum(counted.unknown for counted in self.tokenizer.encode_counted(said))
            if unknown:
                warnings.warn(
                    f"the tokenizer has no tokens for {unknown} bytes of {shown(said[-1])}: the model "
                    "does not see them",
                    stacklevel=2,
                )
        if isinstance(request, str):
            prompt = prompt_files.encode_prompt(self.files, request, self.tokenizer)
        else:
            prompt = chat.encode_chat(self.files, request, self.tokenizer)
        if self._told is not None:
            self._told.check_prompt(prompt)
        check_prompt(self.cfg, prompt, self._limit(prompt))
        return prompt

    def write(self, prompt: list[int]) -> Iterator[str]:
        """Pieces of the continuation as they come."""
        for (piece,) in self._pieces([prompt], [0]):
            if piece:
                yield piece

    def write_ids(self, prompt: list[int]) -> list[int]:
        """The ids of the continuation, with the token that ended it."""
        ids: list[int] = []
        for _ in self._pieces([prompt], [0], [ids]):
            pass
        return ids

    def write_each(
        self, requests: Sequence[Request | ConfigError], first: int = 0
    ) -> list[str | ConfigError]:
        """The continuation of each request, as if it were alone, or the error of one that cannot be continued.

        Args:
          requests: an error stands for a request that could not even be read.
          first: number of the first of them in a longer list: draws depend on the seed and the number.
        """
        texts: list[str | ConfigError] = [""] * len(requests)
        prompts = {}
        for row, request in enumerate(requests):
            try:
                if isinstance(request, ConfigError):
                    raise request
                prompts[row] = self.encode(request)
            except ConfigError as e:
                texts[row] = e
        if prompts:
            good = list(prompts)
            for pieces in self._pieces(list(prompts.values()), [first + row for row in good]):
                for row, piece in zip(good, pieces):
                    texts[row] += piece  # pyright: ignore[reportOperatorIssue]
        return texts

    def _limit(self, prompt: list[int]) -> int:
        """How many tokens may continue a prompt. 1 if there is no room, so that the error says so."""
        usual = self.files.generation.get("max_new_tokens") or prompt_files.MAX_NEW
        most = max(min(usual, self.cfg.max_seq_len - len(prompt)), 1)
        most = most if self._max_new is None else self._max_new
        if self._told is None:
            return most
        return min(most, max(len(self._told.token_N) - len(prompt), 1))

    def _pieces(
        self, prompts: list[list[int]], numbers: list[int], kept: list[list[int]] | None = None
    ) -> Iterator[list[str]]:
        """Pieces of each row's text; their ids are added to the lists of `kept`."""
        rows = [StoppingText(self.tokenizer, self._stop_texts) for _ in prompts]
        at = [len(prompt) for prompt in prompts]
        for new in stream(
            self.run.params,
            self.run.router_state,
            self.cfg,
            prompts,
            [self._limit(prompt) for prompt in prompts],
            numbers=numbers,
            stop=lambda row: rows[row].stopped or self.left is not None,
            **self._options,
        ):
            if self._told is not None:
                new = [self._of_trace(position, ids) for position, ids in zip(at, new)]
            at = [position + len(ids) for position, ids in zip(at, new)]
            for ids, of_row in zip(kept or (), new):
                ids += of_row
            yield [row.push(i for i in ids if i not in self._ends) for row, ids in zip(rows, new)]
        yield [row.flush() for row in rows]

    def _of_trace(self, position: int, ids: list[int]) -> list[int]:
        """The new tokens as far as the trace goes; see `Told.kept`."""
        assert self._told is not None
        if self.left is not None:
            return []
        kept = self._told.kept(position, ids)
        last = position + len(kept) - 1
        if kept and last < len(self._told.token_N) and kept[-1] != self._told.token_N[last]:
            self.left = last
        return kept
