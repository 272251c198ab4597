"""Networks as pure functions, on one convolution that is as fast in a loop as outside of it."""

from mlsec_jax.models import adapt
from mlsec_jax.models._alexnet import alexnet
from mlsec_jax.models._bfloat16 import in_bfloat16
from mlsec_jax.models._conv import conv
from mlsec_jax.models._convnet import convnet
from mlsec_jax.models._dense import linear, logistic_regression, mlp, softmax_regression
from mlsec_jax.models._depthwise import depthwise
from mlsec_jax.models._ensemble import ensemble
from mlsec_jax.models._inpainter import inpainter, patch_critic
from mlsec_jax.models._lenet import lenet
from mlsec_jax.models._mobilenet import mobilenet
from mlsec_jax.models._model import Model
from mlsec_jax.models._pool import avg_pool, global_avg_pool, max_pool
from mlsec_jax.models._resnet import resnet
from mlsec_jax.models._vgg import vgg

__all__ = [
    "Model",
    "adapt",
    "alexnet",
    "avg_pool",
    "conv",
    "convnet",
    "depthwise",
    "ensemble",
    "global_avg_pool",
    "in_bfloat16",
    "inpainter",
    "lenet",
    "linear",
    "logistic_regression",
    "max_pool",
    "mlp",
    "mobilenet",
    "patch_critic",
    "resnet",
    "softmax_regression",
    "vgg",
]
