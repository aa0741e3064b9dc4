"""What a network is trained by that learns from a teacher.

Check: `pytest tests/test_distillation.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repghost.dataset import TeacherLogits


@dataclass(frozen=True)
class Distillation:
    """The teacher's part of the loss.

    loss: `soft`: Kullback-Leibler divergence from the teacher's to the network's probabilities at `temperature`, times
    its square, so that the gradients do not shrink with it (Hinton et al., arXiv 1503.02531). `hard`: cross-entropy
    with the teacher's most probable class (DeiT, arXiv 2012.12877). weight: its share of the whole loss; the labels
    have the rest.
    """

    loss: str
    weight: float
    temperature: float

    def __call__(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The mean over the rows whose label is not -1, without the weight; zero where no row is left.

        logits, teacher: floats [N, C], of the teacher up to a constant for each row; labels: int64 [N].
        """
        logits, teacher = full_precision(logits), full_precision(teacher)
        if self.loss == "hard":
            each = F.cross_entropy(logits, teacher.argmax(dim=1), reduction="none")
        else:
            ours, theirs = ((each / self.temperature).log_softmax(dim=1) for each in (logits, teacher))
            each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1) * self.temperature**2
        learned = labels >= 0
        return torch.where(learned, each, 0).sum() / learned.sum().clamp(min=1)


def dense(logits: TeacherLogits, num_classes: int) -> Tensor:
    """float32 [N, num_classes]: logarithms of the teacher's probabilities, of which the K largest are known.

    What they leave of 1 is spread evenly over the other classes, as in TinyViT (arXiv 2207.10666, section 3.1).
    """
    values = logits.values.float()
    others = num_classes - values.shape[1]
    rest = (1 - values.exp().sum(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    filled = (rest / max(others, 1)).log().expand(-1, num_classes)
    return filled.scatter(1, logits.classes, values)


def full_precision(logits: Tensor) -> Tensor:
    """float32 for the halves; wider types stay."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
