package cmd_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// benchRun runs "bench channel" in a process of its own and returns what it
// prints.
func benchRun(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, append([]string{"bench", "channel"}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// Every way of sending is measured between processes of their own, and nothing
// is lost.
func TestBenchChannel(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	out, errs, err := benchRun(t, "--option", "none,async,ack,sync-ack,rpc,echo", "--senders", "1,3", "--members", "2,3", "--raw", "--duration", "20ms", "--runs", "1", "--json")
	if err != nil {
		t.Fatalf("%v\n%s", err, errs)
	}
	var results []struct {
		Option, System, Error string
		Members               int
		Median                struct {
			Sent, Failed, Delivered int64
			P50, P99                int64
		}
	}
	if err := json.Unmarshal([]byte(out), &results); err != nil {
		t.Fatal(err)
	}
	if len(results) != 6*2*2*2 {
		t.Errorf("%d results", len(results))
	}
	for _, r := range results {
		receivers := int64(r.Members - 1)
		if r.Option == "rpc" || r.Option == "echo" {
			receivers = 1
		}
		if m := r.Median; r.Error != "" || m.Failed != 0 || m.Sent == 0 || m.Delivered < m.Sent || r.Option != "echo" && r.System != "raw" && m.Delivered != m.Sent*receivers || m.P50 <= 0 || m.P99 < m.P50 {
			t.Errorf("%+v", r)
		}
	}
}

func TestBenchRefuses(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--option", "fast"}, "none of none"},
		{[]string{"--members", "1", "--size", "0"}, "--size: 0 is outside"},
		{[]string{"--stack", "dispach", "--duration", "10ms"}, "dispatch"},
		{[]string{"--tribes-jars", t.TempDir()}, "libtomcat10-java"},
		{[]string{"--config", "testdata/none.yaml"}, "none.yaml"},
	} {
		_, errs, err := benchRun(t, c.args...)
		if err == nil || !strings.Contains(errs, c.want) {
			t.Errorf("%v: %v, %s", c.args, err, errs)
		}
	}
}
