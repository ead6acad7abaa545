.DEFAULT_GOAL := help
.PHONY: help demo test lint bench

TARGET := $(or $(CARGO_TARGET_DIR),target)

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: ## Two clusters on this machine: a crossing request, a failover, a recovery; then yours to try
	@.ci/need cc curl
	cargo build --release --locked --bin tombolo
	$(TARGET)/release/tombolo demo

test: ## Every test of the workspace, the end-to-end ones with real processes
	@.ci/need cc curl dig ip
	@testbed/tools/install
	cargo test --workspace --locked

lint: ## Formatting, clippy, docs, unused dependencies, licences and bans
	@.ci/need cc
	.ci/lint

bench: ## Side by side with Envoy: chain, memory, failover, demo, stall (one of them: bench/run NAME)
	@.ci/need cc python3 python3-venv
	bench/run all
