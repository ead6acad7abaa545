# The program alone, for any container runtime: statically linked, so that it needs nothing beside it. `deploy/image` builds both.
FROM scratch
COPY --chmod=0755 tombolo /tombolo
USER 65532:65532
ENTRYPOINT ["/tombolo"]
