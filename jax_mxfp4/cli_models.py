"""The built-in models by name, for help and checks that come before the models are imported."""

BUILTIN = ("books-11m", "mini")  # models.gpt_oss.builtin.BUILTIN_MODELS
NAMES = " or ".join(BUILTIN)
DEFAULT = BUILTIN[0]
