# SPDX-License-Identifier: Apache-2.0
"""Task heads on a Hyena model: masked tokens, labels and vectors of sequences, labels of tokens, spans of answers.

All take the arguments of `HyenaModel.forward` and labels; -100 marks what bears no loss. As in the model, masked
tokens do not exist: no output of a head and no loss depends on them. A head loads from any checkpoint with the same
body and is then the only part that is new, unless the file holds one of that name and shape. Weights have the names
that PEFT trains beside an adapter: `score`, `qa_outputs`.

A head makes no cache unless `use_cache=True` is passed.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_hyena import HyenaConfig
from .modeling_hyena import HyenaForCausalLM, HyenaModel, HyenaPreTrainedModel, check_labels, check_stream, make_norm
from .ops.segments import document_starts


def _last(hidden_states: Tensor, real: Tensor | None) -> Tensor:
    """State of the last real token of every row, (B, L, D) -> (B, D)."""
    if real is None:
        return hidden_states[:, -1]
    columns = torch.arange(1, real.shape[1] + 1, device=real.device)
    return _at(hidden_states, (real * columns).argmax(dim=1))


def _first(hidden_states: Tensor, real: Tensor | None) -> Tensor:
    """State of the first real token of every row, (B, L, D) -> (B, D)."""
    return hidden_states[:, 0] if real is None else _at(hidden_states, real.int().argmax(dim=1))


def _at(hidden_states: Tensor, columns: Tensor) -> Tensor:
    """States (B, L, D) at one column of each row (B,), (B, D)."""
    return hidden_states.gather(1, columns[:, None, None].expand(-1, 1, hidden_states.shape[-1])).squeeze(1)


def _mean(hidden_states: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real tokens of every row, in float32 at least, (B, L, D) -> (B, D)."""
    exact = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    if real is None:
        return exact.mean(dim=1).to(hidden_states.dtype)
    total = exact.masked_fill(~real.unsqueeze(-1), 0).sum(dim=1)
    return (total / real.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


POOLING: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"first": _first, "last": _last, "mean": _mean}


def _between_padding(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """False for the runs of padding tokens at both ends of each row (B, L); a row of nothing else is kept whole."""
    real = input_ids != pad_token_id
    begun = real.cumsum(dim=1) > 0
    unfinished = real.flip(1).cumsum(dim=1).flip(1) > 0
    return (begun & unfinished) | ~real.any(dim=1, keepdim=True)


def _new_columns(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """True for the real ones of the new tokens, (B, length)."""
    return None if attention_mask is None else attention_mask[:, -length:].bool()


def _without_padding(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Token labels (B, L) with -100 for masked tokens."""
    real = _new_columns(attention_mask, labels.shape[1])
    return labels if real is None else labels.masked_fill(~real.to(labels.device), -100)


class _HeadModel(HyenaPreTrainedModel):
    """A `HyenaModel` under the name that every checkpoint gives it."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.model = HyenaModel(config)

    def encode(self, input_ids: Tensor | None, attention_mask: Tensor | None, **kwargs) -> BaseModelOutputWithPast:
        """The body's outputs."""
        kwargs.setdefault("use_cache", False)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def refuse_packing(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        **kwargs,
    ) -> None:
        """Raise where a row holds several documents, for heads with one answer a row."""
        batch, length, _ = check_stream(input_ids, inputs_embeds, self.config)
        told = attention_mask is not None or kwargs.get("past_key_values") is not None or torch.compiler.is_exporting()
        if told or (position_ids is not None and position_ids.shape not in ((batch, length), (1, length))):
            position_ids = None  # they begin no document, or the model will refuse them
        starts = document_starts(
            batch,
            length,
            seq_idx=kwargs.get("seq_idx"),
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            position_ids=position_ids,
        )
        if starts is not None:
            raise ValueError(
                f"{type(self).__name__} gives one answer a row, but rows hold several documents; give each document "
                f"a row of its own, padded, with its attention_mask"
            )


class LMHeadTransform(nn.Module):
    """norm(gelu(dense(x))): what BERT does to hidden states before its head."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = make_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.gelu(self.dense(x)))


class HyenaForMaskedLM(_HeadModel):
    """A bidirectional language model: `HyenaModel` with `is_causal=False` and a linear head over the vocabulary."""

    _tied_weights_keys = HyenaForCausalLM._tied_weights_keys

    def __init__(self, config: HyenaConfig) -> None:
        if config.is_causal:
            raise ValueError(
                "is_causal is True, but HyenaForMaskedLM sees both sides of a masked token; set is_causal=False, or "
                "use HyenaForCausalLM"
            )
        super().__init__(config)
        self.lm_transform = LMHeadTransform(config) if config.lm_head_transform else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_transform)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Logits of the token at every position.

        Arguments as in `HyenaModel.forward`, and one more.

        Args:
            labels: The original token ids at positions to predict, -100 elsewhere (B, L); not shifted.

        Returns:
            `logits` (B, L, V) and `loss` when labels are given.
        """
        outputs = self.encode(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states if self.lm_transform is None else self.lm_transform(hidden_states))
        loss = None
        if labels is not None:
            labels = check_labels(labels, logits.shape[:2], self.config.vocab_size, "vocabulary")
            labels = _without_padding(labels, attention_mask)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class HyenaForSequenceClassification(_HeadModel):
    """A label, several, or numbers for every sequence: `HyenaModel`, pooling, and a linear `score`.

    `config.classifier_pooling` says what is read: by default the last real token of a causal model, which has seen all
    others, and the mean over the real tokens of a bidirectional one.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        self.pool = POOLING[config.classifier_pooling]
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Scores of every row.

        Arguments as in `HyenaModel.forward`, and one more. Packed rows are refused. Without a mask, runs of
        `pad_token_id` at either end of a row are padding (not in exported graphs, which take dense batches).

        Args:
            labels: By `config.problem_type`: classes (B,), -100 where no loss is wanted; 0 or 1 for every label
                (B, num_labels); or numbers (B,) or (B, num_labels). Unset, it is `"regression"` for one label, else
                `"single_label_classification"` for integers and `"multi_label_classification"` for floats.

        Returns:
            `logits` (B, num_labels), `loss` when labels are given, `past_key_values` when asked for.
        """
        self.refuse_packing(input_ids, attention_mask, inputs_embeds, position_ids, **kwargs)
        dense = kwargs.get("past_key_values") is not None or torch.compiler.is_exporting()
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None and not dense:
            attention_mask = _between_padding(input_ids, self.config.pad_token_id)
        outputs = self.encode(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None  # noqa: S101 (narrows the type)
        logits = self.score(self.pool(hidden_states, _new_columns(attention_mask, hidden_states.shape[1])))
        return SequenceClassifierOutputWithPast(
            loss=None if labels is None else self.loss(logits, labels, **kwargs),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def loss(self, logits: Tensor, labels: Tensor, **kwargs) -> Tensor:
        """Loss of scores (B, num_labels); arguments as in `forward`."""
        kind = self._checked_problem(labels, len(logits))
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if kind != "single_label_classification":
            labels = labels.to(exact.dtype).view(exact.shape)
        loss = self.loss_function(
            logits=exact, labels=labels.flatten().long() if kind == "single_label_classification" else labels,
            pooled_logits=exact, config=self.config, **kwargs,
        )  # fmt: skip
        items = kwargs.get("num_items_in_batch")
        if items is not None and kind != "single_label_classification":
            loss = loss * labels.numel() / items  # transformers takes the mean of this batch alone
        return loss

    def _checked_problem(self, labels: Tensor, batch: int) -> str:
        """The kind of problem, by transformers' rule, after refusing labels that do not fit it."""
        kind, count = self.config.problem_type, self.num_labels
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if kind is None and count == 1:
            kind = "regression"
        elif kind is None:
            kind = "single_label_classification" if whole else "multi_label_classification"
        shapes = [(batch, count)]
        if kind == "single_label_classification" or count == 1:
            shapes = [(batch,), (batch, 1)]
        if labels.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but {kind} with {count} labels and {batch} rows takes "
                f"{expected}; check config.problem_type and num_labels"
            )
        if kind == "single_label_classification":
            if not whole:
                raise ValueError(
                    f"{kind} takes whole numbers as labels, got {labels.dtype}; name the class of each row"
                )
            check_labels(labels, None, count, "num_labels")
        elif kind == "multi_label_classification" and not torch.compiler.is_compiling():
            wrong = (labels < 0) | (labels > 1)
            if bool(wrong.any()):
                raise ValueError(f"{kind} takes labels from 0 to 1, got {labels[wrong][0].item()}")
        return kind


class HyenaForTextEncoding(_HeadModel):
    """One vector for every sequence: `HyenaModel`, pooling, a linear layer and tanh, as BERT's pooler.

    `config.classifier_pooling` says what is read, as in `HyenaForSequenceClassification`.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        self.pool = POOLING[config.classifier_pooling]
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Vectors of every row.

        Arguments as in `HyenaModel.forward`. Packed rows are refused. Without a mask all tokens are real, also those
        of padding.

        Returns:
            `pooler_output` (B, D), not normalised, and `last_hidden_state` (B, L, D).
        """
        self.refuse_packing(input_ids, attention_mask, inputs_embeds, position_ids, **kwargs)
        outputs = self.encode(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None  # noqa: S101 (narrows the type)
        pooled = self.pool(hidden_states, _new_columns(attention_mask, hidden_states.shape[1]))
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=torch.tanh(self.pooler(pooled)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HyenaForTokenClassification(_HeadModel):
    """A label for every token: `HyenaModel` and a linear `score`."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Scores of every token.

        Arguments as in `HyenaModel.forward`, and one more.

        Args:
            labels: Class of every token, -100 where no loss is wanted (B, L).

        Returns:
            `logits` (B, L, num_labels) and `loss` when labels are given.
        """
        outputs = self.encode(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            labels = check_labels(labels, logits.shape[:2], self.num_labels, "num_labels")
            loss = self.loss_function(logits, _without_padding(labels, attention_mask), self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class HyenaForQuestionAnswering(_HeadModel):
    """The first and the last token of an answer in a text: `HyenaModel` and two linear scores a token.

    A causal model reads only once, so it should see the question before the text.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Scores of every token for being the first and the last of the answer.

        Arguments as in `HyenaModel.forward`, and two more. Packed rows are refused.

        Args:
            start_positions: Columns of the first tokens (B,), -100 where no loss is wanted.
            end_positions: Columns of the last tokens (B,), likewise.

        Returns:
            `start_logits` and `end_logits` (B, L), the lowest number of their dtype for masked tokens, and `loss` when
            positions are given.
        """
        self.refuse_packing(input_ids, attention_mask, inputs_embeds, position_ids, **kwargs)
        outputs = self.encode(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        logits = self.qa_outputs(outputs.last_hidden_state)
        real = _new_columns(attention_mask, logits.shape[1])
        if real is not None:
            logits = logits.masked_fill(~real.unsqueeze(-1), torch.finfo(logits.dtype).min)
        start_logits, end_logits = (scores.contiguous() for scores in logits.unbind(dim=-1))
        loss = None
        if start_positions is not None or end_positions is not None:
            start = self._checked_positions("start_positions", start_positions, logits, real)
            end = self._checked_positions("end_positions", end_positions, logits, real)
            exact = torch.promote_types(logits.dtype, torch.float32)
            loss = self.loss_function(start_logits.to(exact), end_logits.to(exact), start, end, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def _checked_positions(name: str, positions: Tensor | None, logits: Tensor, real: Tensor | None) -> Tensor:
        """Positions (B,) as transformers' loss reads them, which ignores column L."""
        batch, length = logits.shape[:2]
        if positions is None:
            raise ValueError(f"{name} is missing; a loss takes start_positions and end_positions")
        if positions.shape not in ((batch,), (batch, 1)):
            raise ValueError(f"{name} must have shape ({batch},), one a row, got {tuple(positions.shape)}")
        positions = positions.flatten().to(logits.device)
        if not torch.compiler.is_compiling():
            _check_columns(name, positions, length, real)
        return positions.masked_fill(positions == -100, length)


def _check_columns(name: str, positions: Tensor, length: int, real: Tensor | None) -> None:
    """Refuse columns (B,), except -100, outside the rows or of masked tokens."""
    wrong = ((positions < 0) | (positions >= length)) & (positions != -100)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} holds {positions[wrong][0].item()}, outside the {length} columns of the batch; use -100 where "
            f"the answer was cut off"
        )
    if real is not None:
        masked = (positions != -100) & ~real.gather(1, positions.clamp(min=0).unsqueeze(1)).squeeze(1)
        if bool(masked.any()):
            raise ValueError(
                f"{name} points at column {positions[masked][0].item()}, which is masked; count columns of the "
                f"padded row"
            )


__all__ = [
    "HyenaForMaskedLM",
    "HyenaForQuestionAnswering",
    "HyenaForSequenceClassification",
    "HyenaForTextEncoding",
    "HyenaForTokenClassification",
]
