"""Small made-up data sets in the layouts of the public downloads."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

OFFICE_HOME_CLASSES = ("Alarm_Clock", "Backpack", "Bed")
# Images of each class: 30, 60, 45 and 90 in a domain.
OFFICE_HOME_IMAGES = {"Art": 10, "Clipart": 20, "Product": 15, "Real World": 30}


def make_sarcos_rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 5.0, size=(count, 28))


def write_sarcos(folder: Path, train: np.ndarray, test: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / "sarcos_inv.mat", {"sarcos_inv": train})
    savemat(folder / "sarcos_inv_test.mat", {"sarcos_inv_test": test})


def make_nyuv2_frame(number: int, height: int, width: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(number)
    normals = generator.normal(size=(height, width, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[0, 0] = 0
    depth = generator.uniform(0.5, 9, size=(height, width, 1))
    depth[1, 1] = 0
    return {
        "image": generator.uniform(0.2, 0.8, size=(height, width, 3)).astype(np.float32),
        "label": generator.integers(-1, 13, size=(height, width)).astype(np.float32),
        "depth": depth.astype(np.float32),
        "normal": normals.astype(np.float32),
    }


def write_nyuv2(root: Path, *, num_train: int, num_test: int, height: int, width: int) -> Path:
    for part, count, first in (("train", num_train, 0), ("val", num_test, 100)):
        for number in range(count):
            for kind, array in make_nyuv2_frame(first + number, height, width).items():
                folder = root / "nyuv2" / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{number}.npy", array)
    return root


def office_home_colour(domain: str, class_name: str, number: int) -> tuple[int, int, int]:
    return (
        20 + 60 * list(OFFICE_HOME_IMAGES).index(domain),
        30 + 80 * OFFICE_HOME_CLASSES.index(class_name),
        8 * number,
    )


def write_office_home(root: Path) -> Path:
    for domain, count in OFFICE_HOME_IMAGES.items():
        for class_name in OFFICE_HOME_CLASSES:
            folder = root / domain / class_name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = office_home_colour(domain, class_name, number)
                Image.new("RGB", (12, 9), colour).save(folder / f"{number:05}.jpg", quality=95)
    return root


# Texts per domain; the stems of the public archive.
HUMAN_RATINGS_TEXTS = {
    "tweets": 40,
    "movieReviewSnippets": 60,
    "amazonReviewSnippets": 30,
    "nytEditorialSnippets": 50,
}
HUMAN_RATINGS_RATERS = 6


def human_ratings_files(seed: int = 0) -> dict[str, str]:
    """File name -> content; a text's words decide the mean that its raters scatter about."""
    generator = np.random.default_rng(seed)
    words = {"awful": -3, "poor": -1, "table": 0, "fine": 1, "great": 3}
    files: dict[str, str] = {}
    for stem, count in HUMAN_RATINGS_TEXTS.items():
        texts, ratings = [], []
        for number in range(count):
            word, value = list(words.items())[number % len(words)]
            scores = np.clip(
                np.rint(value + generator.normal(size=HUMAN_RATINGS_RATERS + number % 3)), -4, 4
            ).astype(int)
            # Some tweets of the public file state another mean there.
            stated = scores.mean() - (stem == "tweets" and number % 7 == 0)
            texts.append(f"{number}_1\t{stated:.6f}\tA {word} thing, number {number}.")
            deviation = scores.std()
            ratings.append(f"{number}_1\t{scores.mean():.6f}\t{deviation:.5f}\t{scores.tolist()}")
        files[f"{stem}_GroundTruth.txt"] = "\r\n".join(texts) + "\r\n"
        files[f"{stem}_anonDataRatings.txt"] = "\ufeff" + "\r\n".join(ratings[::-1]) + "\r\n"
    return files


def write_human_ratings(root: Path, files: dict[str, str] | None = None) -> Path:
    """Writes the archive inside the package's source distribution."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        for name, text in (human_ratings_files() if files is None else files).items():
            content = text.encode()
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return root


def diamonds_csv(num_rows: int = 60, seed: int = 0) -> str:
    generator = np.random.default_rng(seed)
    lines = ['"carat","cut","color","clarity","depth","table","price","x","y","z"']
    cuts = ["Fair", "Good", "Very Good", "Premium", "Ideal"]
    clarities = ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"]
    for number in range(num_rows):
        carat = 0.2 + 2 * generator.random()
        sizes = ",".join(f"{factor * carat ** (1 / 3):.2f}" for factor in (6.4, 6.5, 4.0))
        lines.append(
            f'{carat:.2f},"{cuts[number % 5]}","{"JIHGFED"[number % 7]}","{clarities[number % 8]}",'
            f"{61 + generator.normal():.1f},{57 + number % 5},{int(4000 * carat**1.7) + 300},{sizes}"
        )
    return "\n".join(lines) + "\n"


def write_diamonds(root: Path, content: str | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "diamonds.csv").write_text(diamonds_csv() if content is None else content)
    return root


def movielens_files(num_users: int = 30, num_films: int = 25, seed: int = 0) -> dict[str, str]:
    generator = np.random.default_rng(seed)
    genres = ["Drama", "Comedy", "Drama Romance", "Film-Noir Thriller", "Drama Comedy"]
    item = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    item += [f"{n + 1}\tFilm {n}\t{1990 + n % 8}\t{genres[n % 5]}" for n in range(num_films)]
    user = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    user += [f"{n + 1}\t{15 + 2 * n}\t{'FM'[n % 2]}\tother\t{n:05}" for n in range(num_users)]
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for owner in range(num_users):
        films = generator.permutation(num_films)[: 5 + owner % 7]
        inter += [f"{owner + 1}\t{film + 1}\t{1 + (film + owner) % 5}\t88" for film in films]
    return {
        f"ml-100k.{name}": "\n".join(rows) + "\n"
        for name, rows in (("inter", inter), ("item", item), ("user", user))
    }


def write_movielens(root: Path, files: dict[str, str] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in (movielens_files() if files is None else files).items():
        (root / name).write_text(text)
    return root


QM9_COLUMNS = (
    "Dipole_debye", "Polarizability_bohr3", "HOMO_au", "LUMO_au", "R2_bohr2", "ZPVE_au", "InternalEnergy_0K_au",
    "InternalEnergy_298K_au", "Enthalphy_298K_au", "GibbsFreeEnergy_298K_au", "Heatcapacity_Cv_cal_mol_K",
)  # fmt: skip
# The first molecule of the public table.
METHANE = (
    "0.", "13.21", "-0.3877", "0.1171", "35.3641", "0.044749", "-40.47893", "-40.476062", "-40.475117", "-40.498597",
    "6.469",
)  # fmt: skip


def qm9_csv(num_molecules: int = 20, seed: int = 0) -> str:
    generator = np.random.default_rng(seed)
    lines = ["Index,Elements,XYZ_Ang," + ",".join(QM9_COLUMNS)]
    for number in range(num_molecules):
        elements = ["C", *"HHHH"[: 1 + number % 4], *"NOF"[: number % 3]]
        places = generator.normal(scale=1.5, size=(len(elements), 3)).round(4).tolist()
        values = METHANE if number == 0 else [f"{value:.4f}" for value in generator.normal(size=11)]
        if number == 0:
            elements, places = (
                list("CHHHH"),
                [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]],
            )
        quoted = ",".join(f"'{element}'" for element in elements)
        lines.append(f'{number + 1},"[{quoted}]","{places}",' + ",".join(values))
    return "\n".join(lines) + "\n"


def write_qm9(root: Path, parts: dict[str, str] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    given = parts or {}
    for number in (1, 2, 3):
        name = f"qm9_part{number}.csv"
        (root / name).write_text(given.get(name, qm9_csv(seed=number)))
    return root
