"""Whether a prediction is right: by its words, or by a language model, as arXiv 2307.02469 judges Open-VQA."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lynx.eval.questions import Question

logger = logging.getLogger(__name__)

# The paper asks its judge, given the question, whether the prediction implies the truth, for a Yes or a No.
PROMPT = (
    'Given the question "{question}", does the answer "{prediction}" imply the answer "{truth}"? Answer with Yes or No.'
)
_NEW_TOKENS = 8  # of a verdict; some models begin a new line before it

Judge = Callable[[Sequence[tuple[Question, str]]], list[bool]]


def same_words(cases: Sequence[tuple[Question, str]]) -> list[bool]:
    """Whether each prediction is one of the truths of its question, case and outer blanks aside."""
    return [
        prediction.strip().lower() in {truth.strip().lower() for truth in question.truths}
        for question, prediction in cases
    ]


class LanguageModelJudge:
    """Asks a language model of transformers. Where there are several truths, to imply one of them is enough.

    Args:
        folder: of a causal language model and its tokenizer. Prompts follow its chat template, if it has one.
        batch_size: prompts at once.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: transformers cannot read a language model from it.
    """

    def __init__(self, folder: str | Path, *, batch_size: int = 16):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; judge needs the folder of a language model")
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **local)
            self.model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, **local
            ).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: transformers cannot read a language model from it: {error}") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size

    def __call__(self, cases: Sequence[tuple[Question, str]]) -> list[bool]:
        """Whether each prediction is right; a verdict that is neither Yes nor No counts as No."""
        prompts, owners = [], []
        for number, (question, prediction) in enumerate(cases):
            for truth in question.truths:
                prompts.append(PROMPT.format(question=question.text, prediction=prediction, truth=truth))
                owners.append(number)
        replies = [
            reply
            for start in tqdm(range(0, len(prompts), self.batch_size), desc="judging", unit="batch")
            for reply in self.replies(prompts[start : start + self.batch_size])
        ]
        verdicts = [verdict(reply) for reply in replies]
        unclear = [reply for reply, each in zip(replies, verdicts, strict=True) if each is None]
        if unclear:
            logger.warning(
                "%d of %d verdicts are neither Yes nor No and count as No; the first: %r",
                len(unclear), len(replies), unclear[0],
            )  # fmt: skip
        right = {number for number, each in zip(owners, verdicts, strict=True) if each}
        return [number in right for number in range(len(cases))]

    @torch.no_grad()
    def replies(self, prompts: Sequence[str]) -> list[str]:
        """What the language model answers to each prompt, greedily."""
        has_template = self.tokenizer.chat_template is not None
        if has_template:
            prompts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        batch = self.tokenizer(list(prompts), padding=True, add_special_tokens=not has_template, return_tensors="pt")
        ids, mask = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        tokens = self.model.generate(
            ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=_NEW_TOKENS,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return self.tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)


def verdict(reply: str) -> bool | None:
    """What a judge's reply says; None where its first word is neither Yes nor No."""
    word = "".join(letter if letter.isalpha() else " " for letter in reply).split()[:1]
    return {"yes": True, "no": False}.get(word[0].lower()) if word else None
