"""``python -m longmem`` is the command ``longmem``."""

from longmem.cli.main import main

if __name__ == "__main__":
    main()
