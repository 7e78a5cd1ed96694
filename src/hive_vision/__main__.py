"""``python -m hive_vision`` is ``hive-vision``."""

from hive_vision.cli import main

if __name__ == "__main__":
    main()
