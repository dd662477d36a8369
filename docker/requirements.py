"""Print the requirements of the library, or of one of its extras, from pyproject.toml in the working directory."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extra = sys.argv[1:]
print("\n".join(project["optional-dependencies"][extra[0]] if extra else project["dependencies"]))
