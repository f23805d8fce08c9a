"""A device: the processor that a model is compiled for, read from one TOML file."""

import dataclasses
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.targets import detect, known, processors

DEVICES = Path(__file__).parent / "devices"


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind.

    Attributes
    ----------
    cpu : str
        LLVM's name of the core.
    count : int
        How many there are.
    big : bool
        Whether inference should run on them.
    ghz : float or None
        Their highest clock, if it is known.
    """

    cpu: str
    count: int
    big: bool
    ghz: float | None = None


@dataclass(frozen=True)
class Device:
    """What the compiler must know about a device.

    Attributes
    ----------
    name : str
        Name of the device, lower case with dashes.
    description : str
        One line for people.
    triple : str
        LLVM triple, e.g. ``"aarch64-linux-gnu"``.
    cpu : str
        LLVM's ``-mcpu``.
    features : tuple[str, ...]
        LLVM's ``-mattr``, each with its sign, on top of what `cpu` implies.
    instruction_set : str
        Which kernels to use, a name in `known.INSTRUCTION_SETS`.
    required_features : tuple[str, ...]
        What compiled code may use, in Linux's names (``/proc/cpuinfo``); code for this device runs on every
        machine of its architecture that has all of them.
    clusters : tuple[Cluster, ...]
        The cores.
    memory_gib : float
        Main memory.
    glibc : str
        Oldest C library that linked code must load with, e.g. ``"2.28"``.
    emulator : str or None
        QEMU's model for this CPU, or None where it cannot be emulated.
    """

    name: str
    description: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    instruction_set: str
    required_features: tuple[str, ...]
    clusters: tuple[Cluster, ...]
    memory_gib: float
    glibc: str
    emulator: str | None = None

    @property
    def machine(self) -> str:
        """Architecture as ``uname -m`` gives it: ``"x86_64"`` or ``"aarch64"``."""
        return known.TRIPLES[self.triple]

    @property
    def threads(self) -> int:
        """Number of threads to run with: one for each big core."""
        return sum(cluster.count for cluster in self.clusters if cluster.big)

    def clock(self, threads: int = 1) -> float | None:
        """Return the clock in Hz of the slowest core of `threads` threads on the fastest big ones; None if unknown."""
        clocks = [cluster.ghz for cluster in self.clusters if cluster.big for _ in range(cluster.count)]
        if None in clocks:
            return None
        return 1e9 * sorted(clocks, reverse=True)[min(threads, len(clocks)) - 1]

    def tvm_target(self, threads: int | None = None) -> dict:
        """Return the argument of ``tvm.target.Target``.

        Parameters
        ----------
        threads : int, optional
            Cores to compile for; by default `Device.threads`.
        """
        if threads is not None and threads < 1:
            raise AgqError(f"the number of threads must be at least 1, not {threads}")
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.cpu,
            "mattr": list(self.features),
            "num-cores": self.threads if threads is None else threads,
        }


def device_names() -> list[str]:
    """Return the names of the devices that come with the package, sorted."""
    return sorted(path.stem for path in DEVICES.glob("*.toml"))


def load_device(name: str | os.PathLike) -> Device:
    """Return a device.

    Parameters
    ----------
    name : str or path-like
        A name from `device_names`, the path of a TOML file of the same form, or ``"host"``: the best fit to
        this machine, with a thread for each big core that this process may use.

    Raises
    ------
    AgqError
        If there is no such device, or its file is wrong.
    """
    if name == "host":
        return _host()
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in device_names():
            names = ", ".join(device_names())
            raise AgqError(f"unknown device {str(name)!r}: choose host, {names}, or give a path to a .toml file")
        path = DEVICES / f"{name}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AgqError(f"{path} does not exist: it should be the TOML file of a device") from None
    except OSError as error:
        raise AgqError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise AgqError(f"{path} is not valid TOML: {error}") from error
    return _Checker(path).device(values)


def _host() -> Device:
    machine = detect.machine()
    device = load_device(detect.best_device(machine, detect.cpu_features(), detect.cpu_vendor()))
    cores = processors.big_cores(processors.usable_processors())
    return dataclasses.replace(
        device,
        clusters=(Cluster(cpu=device.cpu, count=min(cores, processors.processor_quota() or cores), big=True),),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    )


class _Checker:
    """Turns the values of a device file into a `Device`, or says which key is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, key: str, what: str) -> AgqError:
        return AgqError(f"{self.path}: {key} {what}")

    def device(self, values: dict) -> Device:
        self.keys("the file", values, Device, optional={"emulator"})
        triple = self.choice(values, "triple", known.TRIPLES)
        machine = known.TRIPLES[triple]
        isa = self.choice(values, "instruction_set", known.INSTRUCTION_SETS[machine])
        emulators = known.EMULATORS_OF.get(isa, known.EMULATORS[machine])
        device = Device(
            name=self.pattern(values, "name", r"[a-z0-9][a-z0-9-]{0,63}", "lower-case letters, digits and dashes"),
            description=self.text(values, "description"),
            triple=triple,
            cpu=self.choice(values, "cpu", known.CPUS[machine]),
            features=self.features(values, machine),
            instruction_set=isa,
            required_features=self.names(values, "required_features", known.LINUX_FEATURES[machine]),
            clusters=self.clusters(values["clusters"], machine),
            memory_gib=self.memory(values["memory_gib"]),
            glibc=self.pattern(values, "glibc", r"2\.[0-9]{1,2}", 'a version such as "2.28"'),
            emulator=self.choice(values, "emulator", emulators) if "emulator" in values else None,
        )
        missing = known.INSTRUCTION_SET_NEEDS[device.instruction_set] - set(device.required_features)
        if missing:
            needed = ", ".join(sorted(missing))
            raise self.error("required_features", f"must name {needed} for instruction_set {device.instruction_set}")
        if not device.threads:
            raise self.error("clusters", "must have at least one with big = true")
        return device

    def keys(self, where: str, values: object, form: type, optional: frozenset | set = frozenset()) -> None:
        if not isinstance(values, dict):
            raise self.error(where, "must be a table")
        names = {field.name for field in dataclasses.fields(form)}
        for key in values:
            if key not in names:
                raise self.error(where, f"has an unknown key {key!r}: it may have {', '.join(sorted(names))}")
        for key in sorted(names - set(values) - optional):
            raise self.error(where, f"lacks the key {key!r}")

    def text(self, values: dict, key: str) -> str:
        value = values[key]
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"must be a text, not {value!r}")
        return value

    def pattern(self, values: dict, key: str, pattern: str, what: str) -> str:
        value = self.text(values, key)
        if not re.fullmatch(pattern, value):
            raise self.error(key, f"must be {what}, not {value!r}")
        return value

    def choice(self, values: dict, key: str, choices) -> str:
        value = self.text(values, key)
        if value not in choices:
            raise self.error(key, f"cannot be {value!r}: it may be {', '.join(sorted(choices)) or 'left out'}")
        return value

    def names(self, values: dict, key: str, choices: frozenset) -> tuple[str, ...]:
        names = values[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.error(key, f"must be a list of texts, not {names!r}")
        for name in names:
            if name not in choices:
                raise self.error(key, f"has an unknown name {name!r}: known are {', '.join(sorted(choices))}")
        if len(set(names)) != len(names):
            raise self.error(key, "names something twice")
        return tuple(names)

    def features(self, values: dict, machine: str) -> tuple[str, ...]:
        signed = frozenset(sign + name for name in known.FEATURES[machine] for sign in "+-")
        return self.names(values, "features", signed)

    def clusters(self, values: object, machine: str) -> tuple[Cluster, ...]:
        if not isinstance(values, list) or not values:
            raise self.error("clusters", "must be at least one [[clusters]] table")
        clusters = []
        for value in values:
            self.keys("clusters", value, Cluster, optional={"ghz"})
            if type(value["count"]) is not int or not 1 <= value["count"] <= 1024:
                raise self.error("clusters.count", f"must be a number of cores, not {value['count']!r}")
            if type(value["big"]) is not bool:
                raise self.error("clusters.big", f"must be true or false, not {value['big']!r}")
            cpu = self.choice(value, "cpu", known.CPUS[machine])
            clusters.append(Cluster(cpu=cpu, count=value["count"], big=value["big"], ghz=self.clock(value.get("ghz"))))
        return tuple(clusters)

    def clock(self, value: object) -> float | None:
        if value is None:
            return None
        if type(value) not in (int, float) or not 0.1 <= value <= 10:
            raise self.error("clusters.ghz", f"must be a clock from 0.1 to 10 GHz, not {value!r}")
        return float(value)

    def memory(self, value: object) -> float:
        if type(value) not in (int, float) or not 0 < value < 65536:
            raise self.error("memory_gib", f"must be a size in GiB, not {value!r}")
        return float(value)
