package conformance

import (
	"encoding/json"

	"github.com/longhouse-go/longhouse/core"
)

// Subject is what is tested: a component of one kind, in every form it can run
// in. The subjects of a kind implement a further interface, which the checks of
// its profile use ([InterceptorSubject], [MembershipSubject], …).
type Subject interface {
	// Describe says what the subject is. It has no side effect and always
	// gives the same answer. An error means that the suite cannot run.
	Describe() (Description, error)
}

// Description is what a subject says of itself.
type Description struct {
	// Kind is interceptor, membership, channel, wire, manager, deployer, valve
	// or plugin. Name and Version are for people.
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	// API lists the majors of the plugin protocol that a process speaks.
	API []int `json:"api,omitempty"`
	// SHA256 is the digest of a process's program.
	SHA256 string `json:"sha256,omitempty"`
	// Profiles are the ones that apply; the kind's own, if empty.
	Profiles []string `json:"profiles,omitempty"`
	// Modes are where the subject can run; direct, if empty.
	Modes []core.PluginMode `json:"modes,omitempty"`
	// Features are declared, and will be verified.
	Features []string `json:"features,omitempty"`
	// Details are printed into the report: a descriptor, the answer of
	// "describe", the configuration. Values tagged secret are taken out.
	Details json.RawMessage `json:"details,omitempty"`
}

func (d Description) profiles() []string {
	if len(d.Profiles) == 0 {
		return []string{d.Kind}
	}
	return d.Profiles
}

func (d Description) modes() []core.PluginMode {
	if len(d.Modes) == 0 {
		return []core.PluginMode{core.Direct}
	}
	return d.Modes
}
