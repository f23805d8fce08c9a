"""The names that a device file may use.

LLVM only logs an unknown CPU and silently ignores an unknown feature, so both are checked against these
lists.
"""

INSTRUCTION_SETS = {
    "x86_64": ("avx512vnni", "avx512vnni-xeon", "avxvnni", "avx2", "generic"),
    "aarch64": ("i8mm", "dotprod", "neon", "neon-paper", "generic"),
}

# The features (Linux names) without which the kernels of an instruction set die on their first instruction.
INSTRUCTION_SET_NEEDS = {
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"},
    "avx512vnni-xeon": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"},
    "avxvnni": {"avx_vnni", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "i8mm": {"asimd", "asimddp", "i8mm"},
    "dotprod": {"asimd", "asimddp"},
    "neon": {"asimd"},
    "neon-paper": {"asimd"},
    "generic": set(),
}

TRIPLES = {"x86_64-linux-gnu": "x86_64", "aarch64-linux-gnu": "aarch64"}

# LLVM's -mcpu names.
CPUS = {
    "x86_64": frozenset(
        """x86-64 x86-64-v2 x86-64-v3 x86-64-v4 sandybridge ivybridge haswell broadwell skylake
        skylake-avx512 cascadelake cooperlake icelake-client icelake-server tigerlake rocketlake
        sapphirerapids emeraldrapids graniterapids alderlake raptorlake meteorlake arrowlake
        lunarlake znver1 znver2 znver3 znver4 znver5""".split()
    ),
    "aarch64": frozenset(
        """generic cortex-a34 cortex-a35 cortex-a53 cortex-a55 cortex-a57 cortex-a65 cortex-a72 cortex-a73
        cortex-a75 cortex-a76 cortex-a76ae cortex-a77 cortex-a78 cortex-a78ae cortex-a78c
        cortex-a510 cortex-a520 cortex-a710 cortex-a715 cortex-a720 cortex-a725 cortex-x1
        cortex-x1c cortex-x2 cortex-x3 cortex-x4 cortex-x925 neoverse-e1 neoverse-n1 neoverse-n2
        neoverse-n3 neoverse-v1 neoverse-v2 neoverse-v3 a64fx kryo oryon-1 apple-m4 ampere1
        grace tsv110""".split()
    ),
}

# LLVM's -mattr names, without the sign.
FEATURES = {
    "x86_64": frozenset(
        """sse3 ssse3 sse4.1 sse4.2 popcnt cx16 sahf avx avx2 bmi bmi2 f16c fma lzcnt movbe xsave avx512f
        avx512bw avx512cd avx512dq avx512vl avx512vnni avx512vbmi avx512vbmi2 avx512bf16
        avx512fp16 avx512bitalg avx512ifma avx512vpopcntdq avxvnni avxvnniint8 gfni amx-tile
        amx-int8 amx-bf16 prefer-256-bit prefer-128-bit""".split()
    ),
    "aarch64": frozenset(
        """neon fp-armv8 crc aes sha2 lse rdm rcpc fullfp16 fp16fml dotprod i8mm bf16 jsconv complxnum sve
        sve2 sme""".split()
    ),
}

# What /proc/cpuinfo calls them: "flags" on x86-64, "Features" (the HWCAP names) on AArch64.
LINUX_FEATURES = {
    "x86_64": frozenset(
        """sse sse2 pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm avx avx2 bmi1 bmi2 f16c fma abm movbe xsave
        avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512vbmi avx512_vbmi2
        avx512_bf16 avx512_fp16 avx512_bitalg avx512ifma avx512_vpopcntdq avx_vnni gfni amx_tile
        amx_int8 amx_bf16""".split()
    ),
    "aarch64": frozenset(
        """fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc
        dcpop asimddp sve asimdfhm dit uscat ilrcpc flagm ssbs sb sve2 sveaes frint svei8mm i8mm
        bf16""".split()
    ),
}

# The CPU models that qemu-aarch64 7.2 knows. `max` runs every instruction and proves nothing about which ones code
# uses, so it is there for those alone that no other model has.
EMULATORS = {
    "x86_64": frozenset(),
    "aarch64": frozenset(
        ("a64fx", "cortex-a35", "cortex-a53", "cortex-a57", "cortex-a72", "cortex-a76", "neoverse-n1")
    ),
}
EMULATORS_OF = {"i8mm": frozenset(("max",))}
"""For instruction sets that none of those runs."""
