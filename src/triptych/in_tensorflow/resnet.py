"""Residual networks as functional Keras models (He et al. 2015, arXiv:1512.03385): ImageNet v1.5 and CIFAR.

Every layer is called as its row of `spec.layers()`, which is torchvision's name: `model.get_layer("layer1.0.conv1")`. A layer takes
its dtype from its input, so no global policy is read or set. Images are (N, H, W, C).
"""

from __future__ import annotations

import keras
from keras import KerasTensor, layers

from triptych.core.spec import BatchNormSpec, BlockSpec, ResNetSpec
from triptych.in_tensorflow.layers import BatchNormalization, PaddedConv2D, PaddedMaxPooling2D, PadShortcut


def resnet(spec: ResNetSpec, dtype: str = "float32") -> keras.Model:
    """The network of `spec`: images (N, H, W, C) -> logits (N, classes). Weights are zeros until some are loaded."""
    images = keras.Input(spec.input_shape, dtype=dtype, name="images")
    x = stem(images, spec)
    for block in spec.blocks():
        x = residual_block(x, block, spec.batch_norm)
    x = layers.GlobalAveragePooling2D(data_format="channels_last", dtype=dtype, name="avgpool")(x)
    logits = layers.Dense(spec.num_classes, kernel_initializer="zeros", dtype=dtype, name=spec.head)(x)
    return keras.Model(images, logits, name=spec.name)


def stem(x: KerasTensor, spec: ResNetSpec) -> KerasTensor:
    """Convolution, BatchNorm, ReLU, and for ImageNet a max-pool."""
    x = conv(x, spec.stem.width, spec.stem.kernel, spec.stem.stride, spec.stem.padding, "conv1", spec.batch_norm)
    x = relu(norm(x, spec.batch_norm, "bn1"), "relu")
    pool = spec.stem.max_pool
    if pool is None:
        return x
    return PaddedMaxPooling2D(pool.kernel, strides=pool.stride, padding=pool.padding, dtype=x.dtype, name="maxpool")(x)


def residual_block(x: KerasTensor, block: BlockSpec, batch_norm: BatchNormSpec | None) -> KerasTensor:
    """relu(residual(x) + shortcut(x)), Figures 2 and 5 of the paper."""
    residual = {"basic": basic, "bottleneck": bottleneck}[block.kind](x, block, batch_norm)
    joined = layers.Add(dtype=x.dtype, name=f"{block.name}.add")([residual, shortcut(x, block, batch_norm)])
    return relu(joined, last_layer(block))


def last_layer(block: BlockSpec) -> str:
    """The name of the layer whose output is the block's."""
    return f"{block.name}.relu{2 if block.kind == 'basic' else 3}"


def basic(x: KerasTensor, block: BlockSpec, batch_norm: BatchNormSpec | None) -> KerasTensor:
    """3x3, 3x3."""
    x = conv(x, block.width, 3, block.stride, 1, f"{block.name}.conv1", batch_norm)
    x = relu(norm(x, batch_norm, f"{block.name}.bn1"), f"{block.name}.relu1")
    x = conv(x, block.out_channels, 3, 1, 1, f"{block.name}.conv2", batch_norm)
    return norm(x, batch_norm, f"{block.name}.bn2")


def bottleneck(x: KerasTensor, block: BlockSpec, batch_norm: BatchNormSpec | None) -> KerasTensor:
    """1x1, 3x3, 1x1. v1.5: the stride sits on the 3x3; `keras.applications` has v1, with the stride on the first 1x1 (numerics 10)."""
    x = conv(x, block.width, 1, 1, 0, f"{block.name}.conv1", batch_norm)
    x = relu(norm(x, batch_norm, f"{block.name}.bn1"), f"{block.name}.relu1")
    x = conv(x, block.width, 3, block.stride, 1, f"{block.name}.conv2", batch_norm)
    x = relu(norm(x, batch_norm, f"{block.name}.bn2"), f"{block.name}.relu2")
    x = conv(x, block.out_channels, 1, 1, 0, f"{block.name}.conv3", batch_norm)
    return norm(x, batch_norm, f"{block.name}.bn3")


def shortcut(x: KerasTensor, block: BlockSpec, batch_norm: BatchNormSpec | None) -> KerasTensor:
    """The input itself, projected (option B) or padded with zero channels (option A) where the shape changes."""
    if block.shortcut == "identity":
        return x
    if block.shortcut == "pad":
        return PadShortcut(block.out_channels, strides=block.stride, dtype=x.dtype, name=f"{block.name}.downsample")(x)
    x = conv(x, block.out_channels, 1, block.stride, 0, f"{block.name}.downsample.0", batch_norm)
    return norm(x, batch_norm, f"{block.name}.downsample.1")


def conv(x: KerasTensor, filters: int, kernel: int, stride: int, padding: int, name: str, batch_norm: BatchNormSpec | None) -> KerasTensor:
    """A convolution, with a bias unless a BatchNorm follows."""
    options = {"use_bias": batch_norm is None, "kernel_initializer": "zeros", "dtype": x.dtype, "name": name}
    return PaddedConv2D(filters, kernel, strides=stride, padding=padding, **options)(x)


def norm(x: KerasTensor, spec: BatchNormSpec | None, name: str) -> KerasTensor:
    """BatchNorm with the spec's constants; nothing where it is folded."""
    if spec is None:
        return x
    return BatchNormalization(epsilon=spec.epsilon, momentum=spec.momentum, dtype=x.dtype, name=name)(x)


def relu(x: KerasTensor, name: str) -> KerasTensor:
    """max(x, 0)."""
    return layers.ReLU(dtype=x.dtype, name=name)(x)
