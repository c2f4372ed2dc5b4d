"""Steps within the backward pass: weights move as soon as their gradients are there, which are then freed."""

import functools

import torch
from torch import Tensor, nn

from library import console
from library.training.optimization.parts import Parts
from library.training.optimization.rounding import Rounding
from library.training.optimization.stepper import Stepper, clip_factor, gradient_norm


class FusedStepper(Stepper):
    """Moves the parameters set by set within the only backward pass of a step: with one parameter in each set
    (--fused_backward_pass), or in so many sets (--fused_optimizer_groups).

    Without clipping, what comes out is what a `Stepper` makes. The norm of all gradients is known when most of them are
    gone, so each set is clipped by its own.
    """

    def __init__(self, *arguments, seed: int, sets: int | None):
        super().__init__(*arguments)
        self.parts = Parts(self.optimizer.optimizer, Rounding(seed))
        self.sets = divide_evenly(self.parameters, sets or len(self.parameters))
        self.squares: list[Tensor] = []  # of the norms of the sets that have moved
        self.missing: list[int] = []  # so many gradients of each set are
        self._expect_all()
        for number, members in enumerate(self.sets):
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, number))
        if self.clip_norm is not None:
            alone = "each of its sets of weights" if sets else "each weight"
            console.notice(
                f"--max_grad_norm {self.clip_norm:g} clips the gradients of {alone} by their own norm, because "
                f"{'--fused_optimizer_groups' if sets else '--fused_backward_pass'} never has all of them at once"
            )

    def _expect_all(self) -> None:
        self.missing = [len(members) for members in self.sets]

    def _arrived(self, number: int, parameter: Tensor) -> None:
        self.missing[number] -= 1
        if not self.missing[number]:
            self._take(self.sets[number])

    def _take(self, members: list[nn.Parameter]) -> None:
        norm = gradient_norm(members)
        self.squares.append(norm.square())
        self.parts.take(members, self.number, clip_factor(norm, self.clip_norm))

    def _move(self) -> tuple[Tensor, bool]:
        """What is left: the sets with parameters that the loss does not depend on."""
        for members, missing in zip(self.sets, self.missing, strict=True):
            if 0 < missing < len(members):
                self._take(members)
        self.parts.end()
        norm = torch.stack(self.squares).sum().sqrt() if self.squares else gradient_norm(self.parameters)
        self.squares = []
        self._expect_all()
        return norm, False

    def make_state(self) -> None:
        for members in self.sets:
            self.fill_gradients(members)
            self.parts.take(members, self.number)
        self.parts.end()


def divide_evenly(parameters: list[nn.Parameter], sets: int) -> list[list[nn.Parameter]]:
    """At most so many sets of neighbours, whose gradients arrive together, about equal in their number of values."""
    if sets >= len(parameters):
        return [[parameter] for parameter in parameters]
    left, divided = sum(parameter.numel() for parameter in parameters), []
    rest = list(parameters)
    for number in range(sets, 0, -1):
        own = [rest.pop(0)]
        filled = own[0].numel()
        while len(rest) >= number and (number == 1 or filled + rest[0].numel() / 2 <= left / number):
            filled += rest[0].numel()
            own.append(rest.pop(0))
        left -= filled
        divided.append(own)
    return divided
