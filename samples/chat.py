"""A chat on an exported folder (ONNX Runtime) or an engine (TensorRT): python samples/chat.py FOLDER

What was said stays in the packed cache: a turn reads only its own tokens. Lines come from the terminal or a pipe.
/reset forgets the conversation, /save FILE and /load FILE keep its cache and text, /quit or the end of input ends.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime import Sampler, Sampling, Session, open_session
from hqmq_trt.runtime.tokenizer import TextStream, Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class State:
    """A conversation.

    Attributes:
        messages: turns so far, as chat templates take them.
        text: of the conversation as the model has read and written it, special tokens included.
        pending: tokens of that text which are not in the cache yet.
    """

    messages: list[Message] = field(default_factory=list)
    text: str = ""
    pending: list[int] = field(default_factory=list)


class Chat:
    """One conversation in sequence 0 of a session.

    Attributes:
        state: what was said.
        read_tokens: tokens that the last turn read, its own and any it had to read again.
    """

    def __init__(self, session: Session, sampling: Sampling, max_new_tokens: int, system: str | None) -> None:
        self._session, self._max_new_tokens = session, max_new_tokens
        self._tokenizer = Tokenizer(session.folder, session.manifest)
        if not self._tokenizer.has_chat_template:
            raise HqmqError(f"{session.folder}: its tokenizer has no chat template; use `hqmq-trt run --raw`")
        self._template: Any = AutoTokenizer.from_pretrained(str(session.folder), local_files_only=True)
        self._sampler = Sampler(sampling)
        self._start = State([{"role": "system", "content": system}] if system else [])
        self._stop = set(session.manifest.eos_token_ids)
        self.state = self._start
        self.read_tokens = 0

    def reset(self) -> None:
        """Forget the conversation."""
        self._session.reset(0)
        self.state = self._start

    def say(self, text: str) -> str:
        """Put a user's message, print the answer as it comes, and return it.

        Raises:
            HqmqError: the cache is too small; the conversation is then as it was.
        """
        messages = [*self.state.messages, {"role": "user", "content": text}]
        framed = self._render(messages)
        tokens = [*self.state.pending, *self._encode(framed[len(self.state.text) :])]
        held = int(self._session.lengths[0])
        if not framed.startswith(self.state.text):
            # A template that changes earlier turns (some drop what the model thought): read it all again.
            tokens, held = self._encode(framed), 0
        self._session.check_capacity([held + len(tokens) + self._max_new_tokens - 1])
        if not held:
            self._session.reset(0)
        self.read_tokens = len(tokens)
        answer, pending = self._answer(self._session.append([tokens])[0])
        self.state = State([*messages, {"role": "assistant", "content": answer}], framed + answer, pending)
        return answer

    def _answer(self, logits: Any) -> tuple[str, list[int]]:
        """The answer's text, and its last token if the cache does not hold it."""
        stream, pieces = TextStream(self._tokenizer), []
        for count in range(1, self._max_new_tokens + 1):
            token = self._sampler(logits)
            if token in self._stop:
                pending: list[int] = []
                break
            pieces.append(self._show(stream.push(token)))
            pending = [token]
            if count < self._max_new_tokens:
                logits = self._session.decode([token])[0]
        pieces.append(self._show(stream.finish() + "\n"))
        return "".join(pieces)[:-1], pending

    def save(self, path: Path) -> None:
        """Write the cache to `path`, and what was said beside it."""
        self._session.save_cache(path)
        _sidecar(path).write_text(json.dumps(vars(self.state), ensure_ascii=False), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote, also in another runtime of the same model."""
        try:
            state = State(**json.loads(_sidecar(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise HqmqError(f"{_sidecar(path)}: is not what /save wrote ({error})") from None
        self._session.load_cache(path)
        self.state = state

    def _render(self, messages: list[Message]) -> str:
        text: str = self._template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._template(text, add_special_tokens=False).input_ids]

    @staticmethod
    def _show(piece: str) -> str:
        sys.stdout.write(piece)
        sys.stdout.flush()
        return piece


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _turn(chat: Chat, session: Session, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/reset":
        chat.reset()
    elif command in ("/save", "/load") and argument:
        (chat.save if command == "/save" else chat.load)(Path(argument))
        print(f"[{session.lengths[0]} tokens held]", file=sys.stderr)
    elif line.startswith("/"):
        raise HqmqError(f"unknown command '{line}': use /reset, /save FILE, /load FILE or /quit")
    else:
        start = time.perf_counter()
        chat.say(line)
        seconds = time.perf_counter() - start
        print(f"[read {chat.read_tokens} tokens, {session.lengths[0]} held, {seconds:.2f} s]", file=sys.stderr)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder that `hqmq-trt export` or `hqmq-trt build` wrote.")],
    max_context: Annotated[
        int | None, typer.Option(help="Tokens of a conversation [default: 2048, or the engine's].")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
) -> None:
    """Chat with a model. A line is a message; /reset, /save FILE, /load FILE and /quit are commands."""
    shown = sys.stdin.isatty()
    failed = False
    try:
        Manifest.load(folder)
        with open_session(folder, 1, max_context) as session:
            chat = Chat(
                session, replace(Sampling(), temperature=temperature, top_p=top_p, seed=seed), max_new_tokens, system
            )
            while True:
                if shown:
                    print("> ", end="", flush=True)
                line = sys.stdin.readline()
                if not line or line.strip() == "/quit":
                    break
                try:
                    if line.strip():
                        _turn(chat, session, line.strip())
                except HqmqError as error:
                    print(f"error: {error}", file=sys.stderr)
                    failed = True
    except HqmqError as error:
        print(f"error: {error}", file=sys.stderr)
        failed = True
    if failed and not shown:
        raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
