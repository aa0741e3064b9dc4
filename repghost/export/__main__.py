"""The command `python -m repghost.export`; `repghost.export.options` says what it does.

Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from repghost.errors import run_command
from repghost.export.options import read_options
from repghost.files import require_writable


def run(arguments: Sequence[str]) -> None:
    """Exports as the arguments say."""
    options = read_options(arguments)
    out = options.out or (options.run or Path()) / "export"
    require_writable(out / "a file" if options.format in ("hub", "coreml") else out, "out")

    # What takes seconds to import: the command is understood by now.
    if options.format == "hub" and options.run is not None:
        from repghost.export.hub import export_hub

        out = options.out or options.run / "hub"
        export_hub(options, out)
        print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    elif options.of_detector:
        from repghost.export.detector import export_detector

        print(f"written: {export_detector(options)}")
    else:
        from repghost.export.write import export

        print(f"written: {export(options)}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
