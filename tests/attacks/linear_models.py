"""Linear models that the attack tests share."""


def linear(params, x, key=None):
    """Logits `[n, c]`."""
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"][None, :]


def single(params, x, key=None):
    """One output a row `[n]`."""
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]
