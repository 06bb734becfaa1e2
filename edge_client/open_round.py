"""What a device has computed and sent of the open round, and sends again when it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from edge_client.trainer import Trainer
from wire_protocol.frames import Frame
from wire_protocol.messages import Derivatives

Piece = bytes | Derivatives | None


class OpenRound:
    """The share under way. `send_frame` and `send_answer` put what there is on the link."""

    def __init__(
        self, epoch: int, send_frame: Callable[[bytes], None],
        send_answer: Callable[[Derivatives], None],
    ) -> None:  # fmt: skip
        self._epoch, self._send_frame, self._send_answer = epoch, send_frame, send_answer
        self._work: Iterator[Piece] | None = None
        self._answering: int | None = None  # the round whose cut gradient came
        self._answer: Derivatives | None = None  # to it, until it is acknowledged
        self._sent: list[bytes] = []  # frames of the open round
        self._unsent: list[bytes] = []  # those of them that are to be sent again
        self.begun: int | None = None  # the last round computed here
        self.started_unix_s = 0.0

    @property
    def computing(self) -> bool:
        """True while there is something to compute."""
        return self._work is not None

    @property
    def busy(self) -> bool:
        """True while there is something to compute or to send again."""
        return self.computing or bool(self._unsent)

    @property
    def in_use(self) -> bool:
        """True when a share was begun on the present weights."""
        return self.computing or bool(self._sent)

    def take_part(self, trainer: Trainer, *, again: bool) -> None:
        """Begin the round. When it was begun, and `again`, send all frames again: one was lost."""
        if self._sent:
            if again:
                self._unsent = list(self._sent)
        elif self._work is None and self._answering is None:
            self.started_unix_s = time.time()
            self.begun = trainer.next_round
            self._work = trainer.steps(self._epoch)

    def take_gradient(self, frame: Frame, trainer: Trainer) -> None:
        """The cut gradient: answer it, again when it comes again."""
        if self._answering != frame.round:  # the activation is at the server
            self._answering, self._unsent = frame.round, []
            self._work = trainer.answer(self._epoch, frame.tensor)
        else:
            self.answer_again()

    def answer_again(self) -> None:
        """Send the answer to the cut gradient, if there is one that nobody acknowledged."""
        if self._answer is not None:
            self._send_answer(self._answer)

    def advance(self) -> bool:
        """One frame sent again, or one direction further; True when something was computed."""
        if self._unsent:
            self._send_frame(self._unsent.pop(0))
            return False
        if self._work is None:
            return False
        try:
            piece = next(self._work)
        except StopIteration:
            self._work = None
            return False
        if isinstance(piece, Derivatives):
            self._answer = piece
            self._send_answer(piece)
        elif piece is not None:
            self._sent.append(piece)
            self._send_frame(piece)
        return True

    def drop(self) -> None:
        """What was computed of the open round is of no use any more."""
        self._work, self._sent, self._unsent = None, [], []
        self._answering = self._answer = None
