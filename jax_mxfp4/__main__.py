"""`python -m jax_mxfp4` is the command `jax-mxfp4`."""

from jax_mxfp4.cli import main

if __name__ == "__main__":
    main()
