"""Worker side: the default LightningModule, an image classifier. A user's own one replaces it."""

import math
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from orchestrator.config import UserError
from orchestrator.train.networks import build_network

OptimizerName = Literal["adamw", "sgd"]
# Warm-up where the user names none, as a share of the run.
_WARMUP_SHARE = 0.05
CLASSIFIER_METRICS = ("val_loss", "val_acc", "train_loss")
"""What `ImageClassifier` logs; a subclass may log more."""


class ImageClassifier(pl.LightningModule):
    """Cross-entropy training of one network: warm-up, then a cosine to zero.

    A batch is {"image": float32 (n, 3, S, S) normalised, "label": int64 (n,), "id": [str]}; where
    mixup or cutmix is on, labels in training are float32 (n, num_classes), each row adding up to 1.
    One whose ids are empty stands in for images that could not be read and is not counted.

    Args:
        arch: `tiny_resnet`, or the name of a model of torchvision or timm.
        num_classes: classes of the data set; filled in from the index.
        lr: learning rate after warm-up.
        optimizer: adamw or sgd (with Nesterov's momentum).
        weight_decay: not applied to biases and norms.
        momentum: of sgd.
        label_smoothing: share of the target spread over all classes, in training.
        warmup_steps: steps of linear warm-up; null: a twentieth of the run.
    """

    total_steps: int = 0
    """Steps of the whole run, set before the fit; 0: the learning rate stays after warm-up."""

    def __init__(
        self,
        arch: str = "tiny_resnet",
        *,
        num_classes: int | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        label_smoothing: float = 0.0,
        warmup_steps: int | None = None,
    ) -> None:
        super().__init__()
        _check("num_classes", num_classes, num_classes is not None and num_classes > 0, "above 0")
        _check("lr", lr, lr > 0, "above 0")
        _check("optimizer", optimizer, optimizer in ("adamw", "sgd"), "'adamw' or 'sgd'")
        _check("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        _check("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)")
        _check("warmup_steps", warmup_steps, (warmup_steps or 0) >= 0, "null or at least 0")
        assert num_classes is not None
        self.network = build_network(arch, num_classes)
        self._lr = lr
        self._optimizer = optimizer
        self._weight_decay = weight_decay
        self._momentum = momentum
        self._label_smoothing = label_smoothing
        self._warmup_steps = warmup_steps

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits (n, num_classes) of images (n, 3, S, S)."""
        # DeepSpeed keeps the weights themselves in bf16 or fp16.
        weights = next(self.network.parameters())
        logits: torch.Tensor = self.network(image.to(weights.dtype))
        return logits

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Return the batch's mean loss and log it as train_loss."""
        logits, labels = self(batch["image"]).float(), batch["label"]
        if labels.is_floating_point():
            # DeepSpeed casts every float of a batch to its own precision.
            labels = labels.to(logits.dtype)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        # Loggers get the whole step's mean over all workers in its place.
        self.log("train_loss", loss.detach(), batch_size=len(batch["id"]), logger=False)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        # Sums of losses, hits and samples. Not a metric of torchmetrics: those are submodules,
        # and DeepSpeed would turn their sums into bf16.
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count every sample once."""
        labels, logits = batch["label"], self(batch["image"]).float()
        if not batch["id"][0]:
            return
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        hits = (logits.argmax(1) == labels).sum()
        self._sums += torch.stack([loss, hits, torch.full_like(hits, len(labels))])

    def on_validation_epoch_end(self) -> None:
        """Log val_loss and val_acc over all samples of all workers."""
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        loss, hits, samples = cast(torch.Tensor, sums)
        self.log_dict({"val_loss": loss / samples, "val_acc": hits / samples})

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and a schedule that is stepped after every optimizer step."""
        optimizer = self._build_optimizer()
        total = self.total_steps
        warmup = self._warmup_steps
        if warmup is None:
            warmup = math.ceil(total * _WARMUP_SHARE)

        def factor(step: int) -> float:
            return learning_rate_factor(step, warmup_steps=warmup, total_steps=total)

        scheduler = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _build_optimizer(self) -> Optimizer:
        groups = parameter_groups(self.network, self._weight_decay)
        if self._optimizer == "sgd":
            nesterov = self._momentum > 0
            return SGD(groups, lr=self._lr, momentum=self._momentum, nesterov=nesterov)
        return AdamW(groups, lr=self._lr)


def check_label_kind(label_kind: str) -> None:
    """Hold the data set's labels against what `ImageClassifier` learns.

    Raises:
        UserError: they are not classes.
    """
    if label_kind != "class":
        raise UserError(
            f"model.class_path=orchestrator.train.module.ImageClassifier learns one class for each "
            f"image but the labels of this data set are {label_kind!r}; name a LightningModule of "
            "your own, or pack with class labels."
        )


def _check(name: str, value: object, valid: bool, rule: str) -> None:
    if not valid:
        raise UserError(f"model.init_args.{name} must be {rule}, not {value!r}; change it.")


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups with and without weight decay: none for biases and norms.

    He et al., "Bag of Tricks for Image Classification", CVPR 2019, section 3.1.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return what the learning rate of a step is multiplied with: linear up, then a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if total_steps <= warmup_steps:
        return 1.0
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
