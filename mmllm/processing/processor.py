"""The processor: conversations with media in, a batch with known token counts out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from transformers import AutoProcessor, ProcessorMixin

from mmllm.contract.arguments import Count, Number, bind, parse
from mmllm.contract.errors import UserError, shown
from mmllm.contract.grounding import Coordinates
from mmllm.contract.types import Geometry
from mmllm.data.media.loading import MediaLoader
from mmllm.data.media.sampling import Sampling
from mmllm.model.front_end_plan import FrontEndPlan, shared_plan
from mmllm.model.prompt_bank import user_turns
from mmllm.processing.chat_template import Rendered, render
from mmllm.processing.collate import Example, Medium, VisualBatch, collate
from mmllm.processing.content import PLACEHOLDERS, MediumEntry, entries_of
from mmllm.processing.control_tokens import ControlTokens
from mmllm.processing.expansion import Expander, ReadEntry
from mmllm.processing.media import read_medium
from mmllm.processing.options import SAMPLING, read_options, refuse_unknown
from mmllm.processing.placeholders import add_coordinates, add_placeholders

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 256
"""Upper limit of characters per token of any tokenizer, on average over a text."""


class MMLLMProcessor(ProcessorMixin):
    """Tokenizer + our reader + the arithmetic of the front end.

    Args:
        tokenizer: of the language model.
        model_section: the resolved `model` section; the same as in the model's config.
        llm_width: width of the LLM's embeddings.
        max_length: longest sequence; None = no limit.

    Attributes:
        loader: reads media; replace it to use another back end, other limits or caches.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model_section: dict[str, Any] | None = None,
        llm_width: int = 0,
        max_length: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.model_section = parse(model_section, dict | None, "processor_config.json: model_section")
        self.llm_width = parse(llm_width, Number, "processor_config.json: llm_width")
        self.max_length = parse(max_length, Count | None, "processor_config.json: max_length")
        self._section = json.dumps(model_section, sort_keys=True)
        self._plan: FrontEndPlan | None = None
        self.loader = MediaLoader()
        self.placeholder_ids = add_placeholders(tokenizer)
        vocabulary, where = (model_section or {}).get("vocabulary"), "processor_config.json: model_section.vocabulary"
        if vocabulary:
            add_coordinates(tokenizer, Coordinates(**bind(Coordinates, vocabulary, where)))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError("tokenizer", "has neither a padding nor an end-of-sentence token", hint="another tokenizer")
        tokenizer.padding_side = "left"  # answers are generated after the prompt; training batches use "right"
        # Expanded positions hold an id that every LLM has an embedding for; that embedding is never used there.
        self.filler_id = tokenizer.pad_token_id

    @property
    def plan(self) -> FrontEndPlan:
        """The front end's shape arithmetic, without weights."""
        plan = self._plan or shared_plan(self._section, self.llm_width)
        plan.prompts.use_tokenizer(self.tokenizer)
        return plan

    def use_plan(self, plan: FrontEndPlan) -> None:
        """Take a plan that was made of the same section, instead of making one."""
        self._plan = plan

    def __getstate__(self) -> dict[str, Any]:
        """What a loader worker is sent; it makes a plan of its own."""
        return {**vars(self), "_plan": None}

    @property
    def model_input_names(self) -> list[str]:
        """The inputs of the model's forward that come from here."""
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
    ) -> str | list[str] | VisualBatch | Tensor:
        """Text, or with `tokenize` a batch, of one conversation or a list of them; media are read here.

        Args:
            chat_template: used in place of the tokenizer's.
            processor_kwargs: `padding_side`, and `frames` (or `num_frames`), `fps`, `max_frames`, `sampler`, see
                `sampling`. They may also be given in `kwargs`, beside variables of the template.

        Raises:
            UserError: an argument that nothing uses, a malformed message, a medium that cannot be read.
        """
        if not isinstance(processor_kwargs or {}, dict):
            raise UserError("processor_kwargs", "wrong type", expected="a map", got=shown(processor_kwargs))
        options, variables = read_options({**(processor_kwargs or {}), "return_tensors": return_tensors, **kwargs})
        refuse_unknown([name for name in processor_kwargs or {} if name in variables], "processor_kwargs")
        if not isinstance(conversation, list | tuple) or not conversation:
            raise UserError("conversation", "no messages", expected="a list of messages", got=shown(conversation))
        single = isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        conversations = [getattr(item, "messages", item) for item in conversations]
        how = {"prompt": add_generation_prompt, "continued": continue_final_message}
        how |= {"template": chat_template, "variables": variables}
        if not tokenize:
            texts = [render(self.tokenizer, item, **how).written(self.plan.vocabulary) for item in conversations]
            return texts[0] if single else texts
        sampling = self.sampling(**{name: options[name] for name in SAMPLING})
        examples = [self.encode(item, answers=False, sampling=sampling, **how) for item in conversations]
        batch = self.collate(examples, padding_side=options["padding_side"] or "left")
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        images: object = None,
        text: str | list[str] | None = None,
        videos: object = None,
        **kwargs: Any,
    ) -> VisualBatch:
        """A batch of plain texts with `<image>` and `<video>` where the media belong, in order.

        Args:
            images, videos: media of all texts in order (paths, PIL images, uint8 arrays [T, H, W, 3]), or a list
                for each text.
            kwargs: as `processor_kwargs` of `apply_chat_template`.

        Raises:
            UserError: more media than placeholders or the reverse, or an argument that nothing uses.
        """
        options, unknown = read_options(kwargs)
        refuse_unknown(list(unknown), "processor")
        sampling = self.sampling(**{name: options[name] for name in SAMPLING})
        if self.plan.text_needs:
            what = "this model is guided by the user's turns, which a plain text does not mark"
            raise UserError("text", what, hint="apply_chat_template(..., tokenize=True)")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(item, str) for item in texts):
            raise UserError("processor: text", "wrong type", expected="a text or a list of texts", got=shown(text))
        queues = {"image": _flat(images), "video": _flat(videos)}
        rendered = [Rendered(item, self._take(item, queues)) for item in texts]
        for kind, rest in queues.items():
            if rest:
                raise UserError(
                    f"{kind}s", f"more media than placeholders: {len(rest)} left over", hint=f"add <{kind}>"
                )
        examples = [self._expander().expand(item, self.reader(sampling)) for item in rendered]
        return self.collate(examples, padding_side=options["padding_side"] or "left")

    def _take(self, text: str, queues: dict[str, list]) -> list[MediumEntry]:
        taken = []
        for piece in text.split("<")[1:]:
            for kind, placeholder in PLACEHOLDERS.items():
                if f"<{piece}".startswith(placeholder):
                    if not queues[kind]:
                        raise UserError(
                            f"text {text[:40]!r}", f"more placeholders than media: no {kind} for {placeholder}"
                        )
                    taken.append(MediumEntry(kind, queues[kind].pop(0)))
        return taken

    def encode(
        self,
        messages: list[dict[str, Any]],
        *,
        answers: bool | Literal["last"] = True,
        prompt: bool = False,
        continued: bool = False,
        template: str | None = None,
        variables: dict[str, Any] | None = None,
        sampling: Sampling | None = None,
        name: str = "",
        alignment_level: int | None = None,
        read: ReadEntry | None = None,
    ) -> Example:
        """One conversation: media read, tokens expanded, labels on the assistant turns.

        Args:
            answers: whether to make labels; "last" = of the last answer alone, and no turn is dropped.
            prompt, continued, template, variables: see `mmllm.processing.chat_template.render`.
            sampling: a sampling other than the recipe's, for this conversation.
            alignment_level: how completely text and media match.
            read: a reader of the media (see `reader`), shared by conversations with equal media.

        Raises:
            UserError: a medium cannot be read, or even the first turn is longer than `max_length`.
        """
        level = _checked_level(alignment_level, self.plan.alignment_levels, name)
        how = {"prompt": prompt, "continued": continued, "template": template, "variables": variables}
        expander, read = self._expander(), read or self.reader(sampling)
        while True:
            rendered = render(self.tokenizer, messages, **how)
            shorter = _without_last_turn(messages) if answers is True else None
            if self.max_length is not None and len(rendered.text) > CHARACTERS * self.max_length:
                if shorter is None:  # refuse before tokenising megabytes
                    what = f"a text of {len(rendered.text)} characters"
                    raise UserError(name or "conversation", what, expected=f"at most {self.max_length} tokens")
                messages = shorter
                continue
            example = expander.expand(rendered, read, answers, name)
            example.prompt = self.plan.prompts.encode(user_turns(messages))
            example.alignment_level = level
            if self.max_length is None or len(example.ids) <= self.max_length:
                return example
            if shorter is None:
                visual = expander.visual_tokens(example)
                raise UserError(
                    name or "conversation",
                    f"{len(example.ids)} tokens, {visual} of them visual",
                    expected=f"at most {self.max_length}",
                    hint="fewer frames, or a connector that pools more"
                    if 2 * visual > len(example.ids)
                    else "a shorter text",
                )
            messages = shorter

    def _expander(self) -> Expander:
        return Expander(self.tokenizer, self.controls, self.placeholder_ids, self.filler_id, self.plan)

    def reader(self, sampling: Sampling | None = None, beside: Iterable[Geometry] = ()) -> ReadEntry:
        """Reads the media of one conversation by their positions, each once, however often it is encoded.

        Args:
            sampling: how to sample, unless an entry says; default: the recipe's.
            beside: sizes that are wanted of their pixels beside the encoders' own.
        """
        known: dict[tuple[int, bool], Medium] = {}

        def read(index: int, entry: MediumEntry, tiled: bool) -> Medium:
            if (index, tiled) not in known:
                known[index, tiled] = read_medium(self.loader, self.plan, entry, sampling, tiled, beside)
            return known[index, tiled]

        return read

    def visual_tokens(self, example: Example) -> int:
        """How many positions of an example hold visual tokens."""
        return self._expander().visual_tokens(example)

    @cached_property
    def controls(self) -> ControlTokens:
        """The tokenizer's control tokens, for texts that spell one."""
        return ControlTokens(self.tokenizer)

    def read(self, entry: MediumEntry | dict[str, Any], sampling: Sampling | None = None, tiled: bool = True) -> Medium:
        """Decode one content entry and resize it for every encoder.

        Args:
            entry: a content entry of a medium (see `mmllm.processing.content`).
            sampling: how to sample, unless the entry says; default: the recipe's.
            tiled: cut an image into tiles, if the recipe does that.

        Raises:
            UserError: the entry is malformed, or the medium cannot be read.
        """
        if isinstance(entry, dict):
            (entry,) = entries_of({"content": [entry]})
        return read_medium(self.loader, self.plan, entry, sampling, tiled)

    def sampling(
        self,
        frames: int | None = None,
        fps: float | None = None,
        sampler: str | None = None,
        max_frames: int | None = None,
    ) -> Sampling:
        """The model's own sampling with a different number of frames, rate, limit or sampler.

        Raises:
            UserError: both frames and fps, or an unknown sampler.
        """
        return self.plan.sampling.override(frames, fps, max_frames, sampler)

    def collate(self, examples: list[Example], padding_side: str = "right") -> VisualBatch:
        """A batch: padded ids, mask, labels, and the `visual` dict in which equal media appear once."""
        return collate(examples, self.tokenizer.pad_token_id, padding_side, self.plan.prompts.collate)


def _checked_level(level: int | None, known: int | None, name: str) -> int:
    """The alignment level of a record, -1 if it has none; `known`: how many levels the parts know, if any reads it."""
    if level is None:
        return -1
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        raise UserError(f"sample {name}: level", "not a level", expected="a whole number >= 0", got=level)
    if known is not None and level >= known:
        hint = f"mmllm data align-levels ... --levels {known}, or the connector's `levels`"
        raise UserError(f"sample {name}: level", "no part knows it", expected=f"below {known}", got=level, hint=hint)
    return level


def _flat(media: object) -> list:
    if media is None:
        return []
    if not isinstance(media, list | tuple):
        return [media]
    return [item for group in media for item in (group if isinstance(group, list | tuple) else [group])]


def _without_last_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The conversation without its last question and answer; None if that was the only one."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return messages[: questions[-1]] if len(questions) > 1 else None


AutoProcessor.register("mmllm", MMLLMProcessor)
