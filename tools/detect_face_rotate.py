"""Finds faces: writes each picture upright, scaled or cut out around its face, and names the file after its place."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.detect_faces import DetectFacesOptions
from library.options.work import WorkOptions
from library.tool_files import check_apart, check_writable


def main() -> None:
    console.setup(None)
    settings = cli.parse((DetectFacesOptions, WorkOptions), description=__doc__)
    options = settings[DetectFacesOptions]
    with console.quiet_dependencies():
        from library.preprocessing.faces.files import find_detector
        from library.preprocessing.pictures import find_pictures
    pictures = find_pictures("--src_dir", options.src_dir, recursive=options.recursive)
    check_apart("--dst_dir", options.dst_dir, [options.src_dir], recursive=options.recursive)
    check_writable("--dst_dir", options.dst_dir / "faces")
    file = find_detector(options.model)
    with console.quiet_dependencies():
        from library.preprocessing.faces.detectors import open_detector
        from library.preprocessing.faces.folder import cut_out_faces
    cut_out_faces(pictures, open_detector(file, options.score_threshold), options, settings[WorkOptions])


if __name__ == "__main__":
    cli.run(main, "what is finished stays, the same command goes on from there")
