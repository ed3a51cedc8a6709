package bridge

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
)

// Description is what a plugin says of itself, as the program prints it when it
// is run with the argument "describe": one JSON object for each component.
type Description struct {
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Version string `json:"version"`
	// API lists the majors of the plugin protocol that the program speaks.
	API []int `json:"api"`

	// The rest but the features and the schema is about interceptors: what it
	// handles (send, receive, member, view, tick), and its channel.Descriptor.
	Handles  []string        `json:"handles,omitempty"`
	Flag     channel.Options `json:"flag,omitempty"`
	Mutates  bool            `json:"mutates,omitempty"`
	Stateful bool            `json:"stateful,omitempty"`
	Observer bool            `json:"observer,omitempty"`
	Above    []string        `json:"above,omitempty"`
	Below    []string        `json:"below,omitempty"`
	Provides []string        `json:"provides,omitempty"`
	Requires []string        `json:"requires,omitempty"`
	Wants    []string        `json:"wants,omitempty"`
	Promise  string          `json:"promise,omitempty"`

	// Features are verified by the conformance suite.
	Features []string `json:"features,omitempty"`
	// ConfigSchema is a JSON Schema of the options.
	ConfigSchema json.RawMessage `json:"config_schema,omitempty"`
}

// What an interceptor may handle.
const (
	HandlesSend    = "send"
	HandlesReceive = "receive"
	HandlesMember  = "member"
	HandlesView    = "view"
	HandlesTick    = "tick"
)

var allHandles = []string{HandlesSend, HandlesReceive, HandlesMember, HandlesView, HandlesTick}

// DescribeInterceptor describes a layer under the name of its plugin.
func DescribeInterceptor(name, version string, i channel.Interceptor) Description {
	d := i.Descriptor()
	return Description{
		Kind: "interceptor", Name: name, Version: version, API: []int{APIVersion},
		Handles: handlesOf(i),
		Flag:    d.Flag, Mutates: d.Mutates, Stateful: d.Stateful, Observer: d.Observer,
		Above: d.Above, Below: d.Below, Provides: d.Provides, Requires: d.Requires, Wants: d.Wants, Promise: d.Promise,
	}
}

func handlesOf(i channel.Interceptor) []string {
	_, send := i.(channel.SendHandler)
	_, encode := i.(channel.Encoder)
	_, receive := i.(channel.ReceiveHandler)
	_, decode := i.(channel.Decoder)
	_, member := i.(channel.MemberHandler)
	_, view := i.(channel.ViewFilter)
	_, tick := i.(channel.TickHandler)
	var list []string
	for n, has := range []bool{send || encode, receive || decode, member, view, tick} {
		if has {
			list = append(list, allHandles[n])
		}
	}
	return list
}

// Descriptor returns what the description says as a channel.Descriptor.
func (d Description) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name: d.Name, Flag: d.Flag, Mutates: d.Mutates, Stateful: d.Stateful, Observer: d.Observer,
		Above: d.Above, Below: d.Below, Provides: d.Provides, Requires: d.Requires, Wants: d.Wants, Promise: d.Promise,
	}
}

// Check finds what cannot be in the description of an interceptor.
func (d Description) Check() error {
	for _, h := range d.Handles {
		if !slices.Contains(allHandles, h) {
			return fmt.Errorf("it handles %q, which this version does not know (known: %s): upgrade the node", h, strings.Join(allHandles, ", "))
		}
	}
	if d.Observer && d.Mutates {
		return fmt.Errorf("it calls itself an observer and changes bodies: it must be one of them")
	}
	return nil
}

// Differences names what a running plugin says differently of itself than what
// was pinned, one sentence; empty if nothing is different. What is for people
// alone, the promise and what the layer wants, is left out: it may change.
func (d Description) Differences(running Description) string {
	var list []string
	pinned, now := reflect.ValueOf(d), reflect.ValueOf(running)
	for _, name := range []string{"Kind", "Name", "Version", "Handles", "Flag", "Mutates", "Stateful", "Observer", "Above", "Below", "Provides", "Requires"} {
		a, b := pinned.FieldByName(name), now.FieldByName(name)
		if a.Kind() == reflect.Slice && a.Len() == 0 && b.Len() == 0 {
			continue
		}
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			list = append(list, fmt.Sprintf("%s was pinned as %v and is %v", strings.ToLower(name), a, b))
		}
	}
	return strings.Join(list, "; ")
}
