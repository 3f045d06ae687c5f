"""``python -m oss_ext`` is ``oss``."""

from oss_ext.cli import main

main()
