"Read name, version and requirements from settings.ini, the one place for them."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def lines(key):
    "The non-empty lines of a settings.ini value."
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


setup(
    version=cfg["version"],
    description=cfg["description"],
    license=cfg["license"],
    author=cfg["author"],
    keywords=[word.strip() for word in cfg["keywords"].split(",")],
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements")},
    packages=find_packages(include=["medxfer_nb", "medxfer_nb.*"]),
    entry_points={"console_scripts": ["medxfer = medxfer_nb.cli:main"]},
)
