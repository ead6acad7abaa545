.DEFAULT_GOAL := help
.PHONY: help demo test terraform-test lint bench

TARGET := $(or $(CARGO_TARGET_DIR),target)

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

demo: ## Two clusters on this machine: a crossing request, a failover, a recovery; then yours to try
	@.ci/need cc curl
	cargo build --release --locked --bin tombolo
	$(TARGET)/release/tombolo demo

test: ## Every test of the workspace, the end-to-end ones with real processes
	@.ci/need cc curl dig ip
	@testbed/tools/install
	cargo test --workspace --locked

terraform-test: ## The Terraform modules, without any cloud; part of `make test`
	@.ci/need cc python3
	@testbed/tools/install terraform
	cargo test --locked -p tombolo-terraform

lint: ## Formatting, clippy, docs, unused dependencies, licences and bans
	@.ci/need cc
	.ci/lint

bench: ## Side by side with Envoy: chain, pair, memory, failover, demo, stall (one of them: bench/run NAME)
	@.ci/need cc python3 python3-venv
	bench/run all
