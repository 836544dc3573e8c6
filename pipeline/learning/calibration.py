"""Running statistics of batch normalization, measured again for the weights that are used."""

from collections.abc import Iterable

from torch import Tensor, nn, no_grad
from torch.nn.modules.batchnorm import _BatchNorm


@no_grad()
def update_bn_stats(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of ``net`` to the mean of those of ``batches`` of pixels (B, C, H, W).

    What training leaves behind are statistics of weights that are no longer: of averaged weights they never were, and
    after a few dozen steps those of the first, random ones are still among them ("precise BN": Wu and Johnson,
    Rethinking "Batch" in BatchNorm, 2021). All else of the net runs as in prediction.
    """
    layers = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    momenta, was_training = [layer.momentum for layer in layers], net.training
    net.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    for pixels_BCHW in batches:
        net(pixels_BCHW)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    net.train(was_training)
