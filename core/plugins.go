package core

import (
	"context"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// PluginMode says where a plugin's code runs.
type PluginMode string

const (
	// Direct: a Go call in the node's own process.
	Direct PluginMode = "direct"
	// Bridged: the plugin protocol over an in-memory pipe; for tests.
	Bridged PluginMode = "bridged"
	// Process: an own process, supervised and restarted.
	Process PluginMode = "process"
)

// PluginSpec is the choice of one plugin instance.
type PluginSpec struct {
	// Name is the plugin's name within its kind, "delta" or "acme/zstd".
	Name string
	// Instance tells several instances of one plugin apart, in logs and
	// metrics.
	Instance string
	// Mode is where it runs; empty is the default of its kind.
	Mode PluginMode
	// Options is the plugin's configuration as YAML, empty for none; Origin
	// says where it was written, "server.yaml:12".
	Options []byte
	Origin  string

	// The rest is about interceptors that do not run directly. OnDown says what
	// becomes of new messages while the plugin is down, empty is Fail; Bypass is
	// refused for layers that change bodies. Messages that were on their way
	// through the plugin when it ended are given to its successor in any case.
	OnDown OnDown
	// Window and WindowBytes bound the messages that are on their way through
	// the plugin, in each direction: 1024 and 8 MiB by default. Further ones
	// wait.
	Window, WindowBytes int
	// Timeout is how long a message may take, restarts included; 5 s by
	// default. It fails then.
	Timeout time.Duration
}

// OnDown says what becomes of messages while an interceptor plugin is down.
type OnDown string

const (
	// Fail: sending fails with channel.ErrPluginDown, received messages are
	// dropped with a negative acknowledgement.
	Fail OnDown = "fail"
	// Wait: they wait for the successor, as long as Timeout and the window
	// allow.
	Wait OnDown = "wait"
	// Bypass: they pass as if the layer were not there.
	Bypass OnDown = "bypass"
)

// PluginHost makes plugin instances and watches over them. What it returns
// implements the same interface as the plugin itself: callers cannot tell where
// it runs, except that calls take longer. A call that meets a dead plugin waits
// for its successor as long as its context allows.
type PluginHost interface {
	Membership(spec PluginSpec, s channel.Settings) (channel.Membership, error)
	Manager(spec PluginSpec, s channel.Settings) (Manager, error)
	Deployer(spec PluginSpec, s channel.Settings) (Deployer, error)
	// Interceptor returns a layer that implements exactly the handlers of the
	// plugin. Its Descriptor is known without starting anything.
	Interceptor(spec PluginSpec, s channel.Settings) (channel.Interceptor, error)
	// Check validates a choice and its options without starting anything; kind
	// is membership, manager, deployer or interceptor.
	Check(kind string, spec PluginSpec) error
	// Names lists the plugins of a kind.
	Names(kind string) []string
	// Status describes all instances made so far.
	Status() []PluginStatus
	// Stop ends what is left of all plugins. It works twice.
	Stop(ctx context.Context) error
}

// PluginStatus describes one plugin instance.
type PluginStatus struct {
	Kind     string     `json:"kind"`
	Name     string     `json:"name"`
	Instance string     `json:"instance"`
	Mode     PluginMode `json:"mode"`
	// State is starting, ready, down, backoff, broken or stopped.
	State string `json:"state"`
	// PID is the process, or 0.
	PID int `json:"pid,omitempty"`
	// Generation counts the starts; 1 is the first.
	Generation int `json:"generation"`
	// Started is when the current generation became ready.
	Started time.Time `json:"started,omitzero"`
	// LastError is why the generation before ended.
	LastError string `json:"lastError,omitempty"`
	// Calls, Events and InFlight describe the traffic.
	Calls    int64 `json:"calls"`
	Events   int64 `json:"events"`
	InFlight int64 `json:"inFlight"`
	// Messages counts those that an interceptor has been given, Refused those
	// that OnDown or a full window kept from it.
	Messages int64 `json:"messages,omitempty"`
	Refused  int64 `json:"refused,omitempty"`
	// Memory is the resident memory of the process in bytes, or 0.
	Memory int64 `json:"memory,omitempty"`
	// Unpinned says that the program was started without a digest to check it
	// by: somebody develops it.
	Unpinned bool `json:"unpinned,omitempty"`
}
