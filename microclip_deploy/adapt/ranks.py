"""The processes of one adaptation, as torchrun starts them: each takes its share of every batch.

All hold the same weights and move them by the same gradients. Plain all-reduces, not
DistributedDataParallel: it averages over processes, whose shares may be unequal, and its buckets
hide the time of gradients that are hundreds of MB; those of an adaptation are about 8.

Small numbers that the host decides by go through gloo, tensors on a GPU through NCCL. The death of
a process breaks its connections, and so ends the others.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from microclip_deploy.errors import EnvironmentProblem, UsageError

STEP_TIMEOUT = timedelta(minutes=30)
"""How long processes wait for one that is alive and does not take part in an iteration."""
LEAD_TIMEOUT = timedelta(days=7)
"""How long they wait for what the first one does alone: checking photos, validation, saving."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that adapt together; by itself it is the only one."""

    rank: int = 0
    count: int = 1
    patient: dist.ProcessGroup | None = None
    """Waits for `LEAD_TIMEOUT`."""

    @property
    def leads(self) -> bool:
        """Say whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, images: int) -> slice:
        """Return which rows of a batch are this process's; none where there are too few."""
        return slice(images * self.rank // self.count, images * (self.rank + 1) // self.count)

    def gather(self, rows: Tensor, images: int) -> Tensor:
        """Return the rows (images, ...) of a whole batch, of which `rows` are this one's share."""
        if self.count == 1:
            return rows
        whole = rows.new_zeros(images, *rows.shape[1:])
        whole[self.share(images)] = rows
        return self.sum(whole)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, equal to the bit in each; takes the tensor's place."""
        if self.count > 1:
            self._reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Let each parameter have the sum of its gradients in all processes."""
        if self.count > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            vector_to_parameters(self.sum(parameters_to_vector(gradients)), gradients)

    def any(self, found: int) -> int:
        """Return the largest of a number that each process gives."""
        if self.count == 1:
            return found
        number = torch.tensor(found)
        self._reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def together(self, work: Callable[[], T]) -> T:
        """Do a part of the iteration that one process may lack memory for.

        Raises:
            torch.OutOfMemoryError: in all processes, after one lacked it.
        """
        failed = ""
        try:
            done = work()
        except torch.OutOfMemoryError as error:  # not kept: its frames hold what filled the memory
            failed = str(error) or "out of memory"
        if self.any(bool(failed)):
            raise torch.OutOfMemoryError(failed or "another process is out of memory")
        return done

    def first(self, work: Callable[[], T]) -> T:
        """Do something in the first process, then in the others, which find what it has left."""
        if self.leads:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()

    def wait(self) -> None:
        """Wait until all processes are here, the first one however long it has to work alone."""
        if self.count > 1:
            self._reduce(torch.zeros(1), dist.ReduceOp.SUM, self.patient)

    def require_same(self, number: int) -> None:
        """Make sure that all processes begin with the same state, told by its hash.

        Raises:
            EnvironmentProblem: they do not.
        """
        if self.any(number) != -self.any(-number):
            raise EnvironmentProblem(
                "adapt: expected the same state in all processes, found different ones; --out and "
                "the model must lie where all machines see the same files"
            )

    def leave(self) -> None:
        """End what needs all processes."""
        if self.count > 1:
            self.wait()
            dist.destroy_process_group()

    def _reduce(
        self, tensor: Tensor, how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None = None
    ) -> None:
        try:
            dist.all_reduce(tensor, how, group)
        except RuntimeError as error:  # gloo's and NCCL's alike
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        raise EnvironmentProblem(
            f"adapt, process {self.rank} of {self.count}: expected the others to run until the "
            "end, found that one has ended or cannot be reached; see what it said before it "
            f"did, and continue with --resume ({str(error).splitlines()[0][:200]})"
        ) from error


ALONE = Ranks()


def launched() -> bool:
    """Say whether torchrun, or what sets the same variables, started several processes."""
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and all(map(os.environ.get, names))


def neighbours() -> int:
    """Return how many processes of this adaptation share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if launched() else 1


def own_device(device: str) -> str:
    """Return the device of this process: its own GPU where several processes were started.

    Raises:
        UsageError: one GPU was named for all of them.
    """
    if not launched() or device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return device
    if device.startswith("cuda:"):
        raise UsageError(
            f"--device {device}: expected auto, cuda or cpu under torchrun, where each process "
            "takes a GPU of its own, found one GPU for all; leave it out, and choose GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}" if device in ("auto", "cuda") else device


def join(device: str) -> Ranks:
    """Meet the other processes.

    Args:
        device: of this one, "cpu" or "cuda:N".

    Raises:
        EnvironmentProblem: they do not come, or cannot be reached.
    """
    if not launched():
        return ALONE
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if device != "cpu":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=STEP_TIMEOUT, rank=rank, world_size=count)
        patient = dist.new_group(backend="gloo", timeout=LEAD_TIMEOUT)
        assert isinstance(patient, dist.ProcessGroup), "a group of all"
        return Ranks(rank, count, patient)
    except (RuntimeError, ValueError) as error:
        Ranks(rank, count)._fail(error)
