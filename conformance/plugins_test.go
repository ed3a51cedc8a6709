package conformance_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
)

// The built-in plugins as processes: this test binary serves them, as the
// longhouse binary does.
func TestBuiltinPlugins(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	listen := fmt.Sprint("127.0.0.1:", channeltest.FreePort(t, "udp"))
	for _, p := range []conformance.PluginProgram{
		{Kind: "manager", Name: "delta", Options: "settle_time: 50ms", Features: deltaFeatures},
		{Kind: "manager", Name: "backup", Options: "settle_time: 50ms\ncopies: 1", Features: deltaFeatures},
		{Kind: "membership", Name: "multicast"},
		{Kind: "membership", Name: "static", Options: "members: [\"127.0.0.1:4000\"]"},
		{Kind: "membership", Name: "file", Options: "path: " + t.TempDir() + "/members\nlisten: " + listen},
		{Kind: "membership", Name: "dns", Options: "name: shop.example.com\nserver: 127.0.0.1:1\nlisten: " + listen},
		{Kind: "membership", Name: "kubernetes", Options: "namespace: shop\nserver: http://127.0.0.1:1\nlisten: " + listen},
		{Kind: "membership", Name: "gossip", Options: "secret: the secret of this test\nlisten: " + listen},
		{Kind: "deployer", Name: "watch", Options: "dir: {{dir}}\nscan: 20ms\nsettle: 20ms\ngrace: 0s"},
	} {
		t.Run(p.Kind+"/"+p.Name, func(t *testing.T) {
			p.Path = os.Args[0]
			conformance.Run(t, conformance.Plugin(p), conformance.Seed(1))
		})
	}
}

// The hostile programs are not conformant, and a check says so.
func TestHostilePrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	times := conformance.DefaultTimeouts()
	times.Start, times.Stop, times.Call, times.Event = time.Second, time.Second, 500*time.Millisecond, 500*time.Millisecond
	for program, hows := range map[string][]string{
		"hostile": {"crash", "silent", "endlessline", "oldapi", "newapi", "symlink", "nocert", "grandchild"},
		"rogue":   {"garbage", "hugelength", "wrongreply", "endlesscalls", "refuse", "heirs"},
	} {
		path := filepath.Join(t.TempDir(), program)
		out, err := exec.Command("go", "build", "-o", path, "../plugins/testdata/"+program).CombinedOutput()
		if err != nil {
			t.Fatalf("build %s: %v\n%s", program, err, out)
		}
		for _, how := range hows {
			report, code := conformance.Main(conformance.Plugin(conformance.PluginProgram{
				Path: path, Kind: "manager", Name: "acme/x", Args: []string{how},
			}), conformance.Seed(1), conformance.WithTimeouts(times), conformance.Profile(conformance.ProfilePlugin),
				conformance.Only("plugin/(negotiate|hostile-output)"))
			var failed []string
			for _, r := range report.Checks {
				if r.Result == conformance.Fail {
					failed = append(failed, r.ID+": "+r.Message)
				}
			}
			if code != 1 || len(failed) == 0 {
				t.Errorf("%s %s: code %d, %s", program, how, code, report.Error)
			}
			t.Logf("%s %s: %.300q", program, how, failed)
		}
	}
}
