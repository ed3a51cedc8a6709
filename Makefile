.PHONY: run build test reproduce test-peers lint bench bench-peers bench-sessions fuzz

# A three-node cluster on this machine; the page's address is printed.
run:
	go run ./cmd/longhouse demo

BINARY ?= longhouse

# The binary as it is given away.
build:
	go build -ldflags '-s -w' -o $(BINARY) ./cmd/longhouse

test:
	go test ./...

# Repeats one simulated history of clients by its name, scenario/seed: make reproduce NAME=lock-kill/7
# (up to 20 times: a seed does not decide everything, see conformance/README.md)
reproduce:
	go test ./conformance/history -count=20 -failfast -run 'TestHistories$$' -args -history.name='$(NAME)'

# Longhouse nodes in one group with Apache Tribes nodes, live. Needs Java and the jars of Tomcat; on Debian:
# apt-get install --no-install-recommends libtomcat10-java default-jdk-headless
test-peers:
	LONGHOUSE_CI=1 go test ./conformance/peer -count=1 -v -run TestPeers

lint:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not formatted:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	go tool staticcheck ./...

# Go benchmarks, then both servers side by side with the ratios (needs wrk).
bench:
	go test -run '^$$' -bench . -benchmem ./...
	go run ./.ci/bench

# Messages between nodes beside Apache Tribes and plain TCP, with the ratios. Needs Java and the jars of Tomcat, as test-peers;
# BENCH="-runs 1 -only acks" chooses.
bench-peers:
	go run ./.ci/bench-peers $(BENCH)

# Sessions beside two Tomcats, with the ratios; a joining node's state transfer and who waits for it; memory per session.
# Needs wrk, redis-server, and what test-peers needs; BENCH="-only tomcat -managers delta -sends sync" chooses, BENCH=-help tells.
bench-sessions:
	go run ./.ci/bench -only tomcat,transfer,memory $(BENCH)

fuzz:
	.ci/fuzz 30s
