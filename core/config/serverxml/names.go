package serverxml

import (
	"maps"
	"slices"

	"github.com/longhouse-go/longhouse/channel"
)

// The names of the built-in components and their options that Tomcat's classes
// are mapped to.
const (
	managerName     = "delta"
	backupName      = "backup"
	membershipName  = "multicast"
	kubernetesName  = "kubernetes"
	dnsName         = "dns"
	deployerName    = "watch"
	dispatchName    = "dispatch"
	detectorName    = "failuredetector"
	throughputName  = "throughput"
	binderName      = "routebinder"
	replicationName = "replication"
	signOnName      = "singlesignon"
	persistentName  = "persistent"
)

// Classes that exist in Tomcat and not here, by the last part of their name.
// The text says what is missing without them.
var (
	missingManagers = map[string]string{
		"SimpleTcpReplicationManager": "it copies whole sessions",
	}
	missingValves = map[string]string{
		"RemoteAddrValve":             "without it requests are not refused by address",
		"RemoteHostValve":             "without it requests are not refused by host name",
		"RemoteCIDRValve":             "without it requests are not refused by address",
		"RewriteValve":                "without it URLs are not rewritten",
		"StuckThreadDetectionValve":   "without it slow requests are not reported",
		"SemaphoreValve":              "without it the number of concurrent requests is bounded by the connector only",
		"CrawlerSessionManagerValve":  "without it each request of a crawler may make a session",
		"ExtendedAccessLogValve":      "without it its log is not written",
		"JDBCAccessLogValve":          "without it its log is not written",
		"JsonAccessLogValve":          "without it its log is not written",
		"RequestDumperValve":          "without it requests are not printed",
		"BasicAuthenticator":          "without it requests are not authenticated",
		"DigestAuthenticator":         "without it requests are not authenticated",
		"FormAuthenticator":           "without it requests are not authenticated",
		"SSLAuthenticator":            "without it requests are not authenticated",
		"SpnegoAuthenticator":         "without it requests are not authenticated",
		"NonLoginAuthenticator":       "without it requests are not authenticated",
		"LoadBalancerDrainingValve":   "without it a disabled node keeps its users",
		"ProxyErrorReportValve":       "without it errors are reported plainly",
		"JsonErrorReportValve":        "without it errors are reported plainly",
		"SSLValve":                    "without it client certificates from a proxy's headers are not read",
		"ParameterLimitValve":         "without it the number of parameters is not bounded",
		"FilterValve":                 "without it Java filters do not run",
		"RequestTrackingHostValve":    "without it sessions are not kept in memcached",
		"RequestTrackingContextValve": "without it sessions are not kept in memcached",
	}
)

// whyMissing says why a class cannot be had and what to do. Beside those of the
// table, the classes in available exist.
func whyMissing(class string, table map[string]string, remedy string, available ...string) (why, fix string) {
	if why, ok := table[class]; ok {
		return why, remedy
	}
	if near := channel.Nearest(class, slices.AppendSeq(available, maps.Keys(table))); near != "" {
		return "the class is not known", "did you mean " + near + "?"
	}
	return "the class is not known", remedy
}
