"""The processor: conversations with media in, a batch with known token counts out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from transformers import AutoProcessor, ProcessorMixin

from mmllm.batch import Example, Medium, VisualBatch, collate
from mmllm.chat import LOCATORS, PLACEHOLDERS, Rendered, render
from mmllm.contract.errors import UserError
from mmllm.data.loading import Loaded, MediaLoader, resized
from mmllm.data.media import Clip, MediaRef
from mmllm.data.sampling import Sampling
from mmllm.front_end import FrontEnd, shape_copy
from mmllm.prompts import said_by_user


class MMLLMProcessor(ProcessorMixin):
    """Tokenizer + our reader + the arithmetic of the front end.

    Args:
        tokenizer: of the language model.
        model_section: the resolved `model` section; the same as in the model's config.
        llm_width: width of the LLM's embeddings.
        max_length: longest sequence; None = no limit.

    Attributes:
        loader: reads media; another one reads with another back end, other limits, or from caches.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_section: dict[str, Any] | None = None,
        llm_width: int = 0,
        max_length: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.model_section, self.llm_width, self.max_length = model_section, llm_width, max_length
        self._section = json.dumps(model_section, sort_keys=True)
        self.loader = MediaLoader()
        missing = [token for token in PLACEHOLDERS.values() if token not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_tokens(missing, special_tokens=True)
        self.placeholder_ids = {tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS.values()}
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Expanded positions hold an id that every LLM has a row for; the row itself is never used there.
        self.filler_id = tokenizer.pad_token_id

    @property
    def front_end(self) -> FrontEnd:
        """The shape arithmetic, without weights."""
        front = shape_copy(self._section, self.llm_width)
        front.prompts.use_tokenizer(self.tokenizer)
        return front

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes from here."""
        return ["input_ids", "attention_mask", "visual"]

    def apply_chat_template(
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text, or with `tokenize` a batch, of one conversation or of a list of them; media are read here.

        Args:
            processor_kwargs: `padding_side`, and `frames`, `fps`, `sampler` (see `sampling`).
        """
        single = bool(conversation) and isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        conversations = [getattr(item, "messages", item) for item in conversations]
        if not tokenize:
            options = {"prompt": add_generation_prompt, "continued": continue_final_message}
            texts = [render(self.tokenizer, item, **options).text for item in conversations]
            return texts[0] if single else texts
        options = dict(processor_kwargs or {})
        side = options.pop("padding_side", "left")
        sampling = self.sampling(**{key: options.get(key) for key in ("frames", "fps", "sampler")})
        examples = [
            self.encode(
                item, answers=False, prompt=add_generation_prompt, continued=continue_final_message, sampling=sampling
            )
            for item in conversations
        ]
        batch = self.collate(examples, padding_side=side)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> VisualBatch:
        """A batch of plain texts with `<image>` and `<video>` where the media stand, in order.

        Args:
            images, videos: media of all texts in order (paths, PIL images, uint8 arrays [T, H, W, 3]), or a list
                for each text.

        Raises:
            UserError: more media than placeholders or the reverse.
        """
        if self.front_end.text_needs:
            what = "this model is guided by what the user says, which a plain text does not mark"
            raise UserError("text", what, hint="apply_chat_template(..., tokenize=True)")
        texts = [text] if isinstance(text, str) else list(text or [])
        queues = {"image": _flat(images), "video": _flat(videos)}
        rendered = [Rendered(item, self._take(item, queues)) for item in texts]
        for kind, rest in queues.items():
            if rest:
                raise UserError(
                    f"{kind}s", f"more media than placeholders: {len(rest)} left over", hint=f"add <{kind}>"
                )
        return self.collate([self._expand(item) for item in rendered], padding_side=padding_side)

    def _take(self, text: str, queues: dict[str, list]) -> list[dict[str, Any]]:
        taken = []
        for piece in text.split("<")[1:]:
            for kind, placeholder in PLACEHOLDERS.items():
                if f"<{piece}".startswith(placeholder):
                    if not queues[kind]:
                        raise UserError(
                            f"text {text[:40]!r}", f"more placeholders than media: no {kind} for {placeholder}"
                        )
                    taken.append({"type": kind, kind: queues[kind].pop(0)})
        return taken

    def encode(
        self,
        messages: list[dict[str, Any]],
        *,
        answers: bool = True,
        prompt: bool = False,
        continued: bool = False,
        sampling: Sampling | None = None,
        name: str = "",
        level: int | None = None,
    ) -> Example:
        """One conversation: media read, tokens expanded, labels on the assistant's turns.

        Args:
            answers: whether to make labels. prompt, continued: see `mmllm.chat.render`.
            sampling: another than the recipe's, for this conversation. level: how completely text and media fit.

        Raises:
            UserError: a medium cannot be read, or even the first turn is longer than `max_length`.
        """
        level = _checked_level(level, self.front_end.alignment_levels, name)
        known: dict[Any, Medium] = {}  # by its entry's identity: read once, however many turns have to go
        while True:
            rendered = render(self.tokenizer, messages, prompt=prompt, continued=continued)
            example = self._expand(rendered, answers, sampling, name, known)
            example.prompt = self.front_end.prompts.encode(said_by_user(messages))
            example.level = level
            if self.max_length is None or len(example.ids) <= self.max_length:
                return example
            shorter = _without_last_turn(messages) if answers else None
            if shorter is None:
                visual = sum(self._length(example.media[index], stream) for _, index, stream in example.spans)
                raise UserError(
                    name or "conversation",
                    f"{len(example.ids)} tokens, {visual} of them visual",
                    expected=f"at most {self.max_length}",
                    hint="fewer frames, or a connector that pools more"
                    if 2 * visual > len(example.ids)
                    else "a shorter text",
                )
            messages = shorter

    def _expand(
        self,
        rendered: Rendered,
        answers: bool = False,
        sampling: Sampling | None = None,
        name: str = "",
        known: dict[Any, Medium] | None = None,
    ) -> Example:
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=answers)
        offsets = encoded["offset_mapping"] if answers else None
        example = Example([], [] if answers else None, name=name)
        for position, token in enumerate(encoded["input_ids"]):
            if token in self.placeholder_ids:
                self._append_medium(example, rendered, sampling, {} if known is None else known)
                continue
            example.ids.append(token)
            if answers:
                # Overlap, not inclusion: many tokenizers join a word with the blank before it.
                first, last = offsets[position]
                learnt = any(last > start and first < end for start, end in rendered.answers)
                example.labels.append(token if learnt else -100)
        if len(example.media) != len(rendered.media):
            raise UserError(name or "text", "a placeholder was lost in tokenisation")
        if self.front_end.first:
            self._put_first(example)
        return example

    def _put_first(self, example: Example) -> None:
        """The streams that stand at the start of the sequence, after BOS, whatever the place of their medium."""
        start = int(bool(example.ids) and example.ids[0] == self.tokenizer.bos_token_id)
        front, at = self.front_end, start
        first: list[tuple[int, int, int]] = []
        for index, medium in enumerate(example.media):
            for stream, node in enumerate(front.output[medium.spec.kind]):
                if node in front.first:
                    first.append((at, index, stream))
                    at += self._length(medium, stream)
        example.ids[start:start] = [self.filler_id] * (at - start)
        if example.labels is not None:
            example.labels[start:start] = [-100] * (at - start)
        example.spans = [*first, *((place + at - start, index, stream) for place, index, stream in example.spans)]

    def _append_medium(
        self, example: Example, rendered: Rendered, sampling: Sampling | None, known: dict[Any, Medium]
    ) -> None:
        if len(example.media) >= len(rendered.media):
            raise UserError(example.name or "text", "more placeholders than media")
        entry = rendered.media[len(example.media)]
        # one image alone is worth its details; with others, each is one view (LLaVA-OneVision)
        alone = len(rendered.media) == 1
        if (id(entry), alone) not in known:
            known[id(entry), alone] = self.read(entry, sampling, tiled=alone)
        medium = known[id(entry), alone]
        for stream, node in enumerate(self.front_end.output[medium.spec.kind]):
            if node in self.front_end.first:
                continue  # put in when all is known
            example.spans.append((len(example.ids), len(example.media), stream))
            example.ids += [self.filler_id] * self._length(medium, stream)
        if example.labels is not None:
            example.labels += [-100] * (len(example.ids) - len(example.labels))
        example.media.append(medium)

    def _length(self, medium: Medium, stream: int) -> int:
        return self.front_end.streams(medium.spec)[stream].tokens

    def read(self, entry: dict[str, Any], sampling: Sampling | None = None, tiled: bool = True) -> Medium:
        """Decode one content entry and resize it for every encoder.

        Args:
            entry: `{"type", "path", "start", "end", "frames", "fps"}`, or an array or PIL image instead of a path.
            tiled: cut an image into tiles, where the recipe does that.
        """
        kind = entry["type"]
        source = next(entry[key] for key in LOCATORS if entry.get(key) is not None)
        sampling = sampling or self.front_end.sampling
        if entry.get("frames") is not None:
            sampling = Sampling(frames=entry["frames"], sampler=sampling.sampler)
        wanted = self.front_end.geometries
        tiling = self.front_end.tiling if tiled and kind == "image" else None
        if isinstance(source, str) or hasattr(source, "__fspath__"):
            ref = MediaRef(kind, str(source), entry.get("start"), entry.get("end"), entry.get("fps"))
            loaded, key = self.loader.load(ref, sampling, wanted, tiling), (ref, sampling, tiling)
        else:
            clip = _in_memory(source, kind, sampling)
            loaded, key = resized(clip, kind, tuple(wanted.values()), tiling), (kind, id(source), sampling, tiling)
        return _medium(key, loaded, source)

    def sampling(self, frames: int | None = None, fps: float | None = None, sampler: str | None = None) -> Sampling:
        """The model's own sampling with a number of frames, a rate or a sampler of its own.

        Raises:
            UserError: both frames and fps, or an unknown sampler.
        """
        own = self.front_end.sampling
        sampler = sampler or own.sampler
        if frames is None and fps is None:
            frames, fps = own.frames, own.fps
        return Sampling(frames=frames, fps=fps, max_frames=own.max_frames if fps else None, sampler=sampler)

    def collate(self, examples: list[Example], padding_side: str = "right") -> VisualBatch:
        """A batch: padded ids, mask, labels, and the `visual` dict in which equal media appear once."""
        return collate(examples, self.tokenizer.pad_token_id, padding_side, self.front_end.prompts.collate)


def _checked_level(level: int | None, known: int | None, name: str) -> int:
    """The alignment level of a record, -1 where it carries none; `known`: how many the parts know, if any reads it."""
    if level is None:
        return -1
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        raise UserError(f"sample {name}: level", "not a level", expected="a whole number >= 0", got=level)
    if known is not None and level >= known:
        hint = f"mmllm data align-levels ... --levels {known}, or the connector's `levels`"
        raise UserError(f"sample {name}: level", "no part has it", expected=f"below {known}", got=level, hint=hint)
    return level


def _medium(key: Any, loaded: Loaded, source: Any) -> Medium:
    return Medium(key, loaded.spec, loaded.times, loaded.pixels, loaded.features, loaded.keys, source)


def _flat(media: Any) -> list:
    if media is None:
        return []
    if not isinstance(media, list | tuple):
        return [media]
    return [item for group in media for item in (group if isinstance(group, list | tuple) else [group])]


def _without_last_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The conversation without its last question and answer; None if that was the only one."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return messages[: questions[-1]] if len(questions) > 1 else None


def _in_memory(source: Any, kind: str, sampling: Sampling) -> Clip:
    """Frames that are in memory already: a PIL image or uint8 [H, W, 3] or [T, H, W, 3] (one frame a second)."""
    from PIL import ImageOps

    array = np.asarray(ImageOps.exif_transpose(source).convert("RGB") if hasattr(source, "convert") else source)
    array = array[None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(f"{kind} array", "wrong shape or type", expected="uint8 [T, H, W, 3]", got=array.shape)
    if kind == "video":
        from mmllm.data.media import Probe

        probe = Probe("video", len(array), 1.0, *array.shape[1:3])
        index = sampling.indices(probe, None, None)
        return Clip(array[index], np.asarray(index, dtype=np.float64))
    return Clip(array[:1], np.zeros(1))


AutoProcessor.register("mmllm", MMLLMProcessor)
