# The targets people need. `sudo make demo` and `sudo make test` do all the set-up on a fresh Debian 12 machine
# that has Rust; without sudo, run `sudo make setup` once and build as you like.
#
# Under sudo, everything that writes into the tree runs as the user who called sudo; only what needs it (packages,
# namespaces, kernel programs) runs as root.

AS_CALLER := scripts/as-caller
PODWAY := target/release/podway

.PHONY: help setup build demo test cases vm check budget clean

help:
	@echo "sudo make demo    set up, build, and bring up the example cluster"
	@echo "sudo make test    set up, build, and run every test"
	@echo "make cases        run other projects' test cases from PODWAY_CASES; one suite with SUITE=services"
	@echo "sudo make vm      run the datapath's tests on kernel 6.1, in a virtual machine"
	@echo "sudo make setup   install what is missing (Debian packages, bpf-linker)"
	@echo "make build        build the kernel object and $(PODWAY)"
	@echo "make check        formatting, lints, licences"
	@echo "sudo make budget  print and check the kernel programs' budget on this kernel"
	@echo "make clean        remove what was built"

setup:
	@scripts/setup

build:
	@$(AS_CALLER) cargo xtask bpf
	@$(AS_CALLER) cargo build --release --locked --package podway
	@$(AS_CALLER) ln -sf podway target/release/podway-cni

demo: setup build
	@scripts/demo $(PODWAY)

test: setup build
	@$(AS_CALLER) cargo xtask test-build
	@$(AS_CALLER) cargo build --quiet --package xtask
	@target/debug/xtask test-run $(TESTS)

# Cases are data, kept outside of this tree: in ../shared/cases, or wherever PODWAY_CASES says.
cases:
	@$(AS_CALLER) cargo run --quiet --locked --package podway-cases -- $(SUITE)
ifneq ($(filter services,$(or $(SUITE),services)),)
	@$(AS_CALLER) cargo xtask cases-build
	@if [ "$$(id -u)" -eq 0 ]; then target/debug/xtask cases-run; else \
		echo "skipped: the kernel's share of the services' packets needs root; run \`sudo make cases\`"; fi
endif

# Any kernels: make vm KERNELS="6.1 6.12"
KERNELS := 6.1
vm:
	@scripts/setup qemu-system-x86 xz-utils
	@$(AS_CALLER) cargo xtask bpf
	@$(AS_CALLER) cargo xtask vm $(KERNELS:%=--kernel %)

budget: setup
	@$(AS_CALLER) cargo xtask bpf
	@$(AS_CALLER) cargo build --quiet --package xtask --package podway-bpf-host --example budget
	@target/debug/xtask budget

check:
	@$(AS_CALLER) cargo fmt --all --check
	@$(AS_CALLER) cargo clippy --workspace --all-targets --locked --quiet -- --deny warnings
	@$(AS_CALLER) cargo deny --log-level error check licenses bans sources

clean:
	@$(AS_CALLER) cargo clean
