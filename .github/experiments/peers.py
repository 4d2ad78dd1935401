# SPDX-License-Identifier: MIT
"""torchvision's ResNet-18, and a Swin of nano's size, in the training of train.py.

    torchrun --nproc_per_node=2 .github/experiments/peers.py resnet18 --data DIR --epochs 12 --out runs/resnet18
    torchrun --nproc_per_node=2 .github/experiments/peers.py swin --data DIR --epochs 37 --out runs/swin
    python .github/experiments/peers.py swin --checkpoint runs/swin/last.pt --data DIR --image-size 160

Data, augmentation, optimizer, schedule, averaging and evaluation are those of `train.py --task cls` and of
eval.py, with the same flags; only the model differs.  --epochs is chosen so that a run takes as many minutes.
"""

import sys
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from clusterformer import ClassificationHead, ClusterFormer  # noqa: E402

SWIN = dict(patch_size=[4, 4], embed_dim=32, depths=[1, 2, 2, 1], num_heads=[1, 2, 4, 8], window_size=[8, 8])
MODELS = {
    "resnet18": lambda classes: torchvision.models.resnet18(num_classes=classes),
    "swin": lambda classes: torchvision.models.SwinTransformer(
        **SWIN, mlp_ratio=4.0, stochastic_depth_prob=0.0, num_classes=classes
    ),
}


class Peer(nn.Module):
    """A model of torchvision with what train.py uses of ClusterFormer."""

    task = "cls"
    trained = None  # the model in training, not the averaged copy of it
    loss, count = ClassificationHead.loss, ClusterFormer.count

    def __init__(self, task, variant, num_classes, *others):
        super().__init__()
        self.arguments = dict(task=task, variant=variant, num_classes=num_classes)
        self.label_smoothing = others[3] if others else 0.0  # ClusterFormer's seventh argument
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.model = MODELS[NAME](num_classes)

    def forward(self, images):
        if self.training:
            Peer.trained = self
        images = torch.stack(images) if isinstance(images, list) else images
        return {"logits": self.model((images - self.mean) / self.std)}

    @torch.no_grad()
    def predict(self, images, sizes=None):
        if self.trained:  # train.py averages parameters only, not the statistics of batch normalization
            for mine, theirs in zip(self.buffers(), self.trained.buffers()):
                mine.copy_(theirs)
        return ClassificationHead.predict(self, self.eval()(images), None, None)


if __name__ == "__main__":
    NAME = sys.argv.pop(1)
    train.ClusterFormer = evaluation.ClusterFormer = Peer
    script = evaluation if "--checkpoint" in sys.argv else train
    script.in_one_line(script.main)
