package channel

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"text/tabwriter"

	"go.uber.org/zap"
)

// Properties that layers provide or require, see [Descriptor]. Other words may
// be used too; these are the ones that [Stack.Explain] knows.
const (
	// PropOrder: messages of one sender arrive in the order they were sent.
	PropOrder = "order"
	// PropTotalOrder: all members see all messages in one order.
	PropTotalOrder = "total-order"
	// PropAsync: messages with the option Async are queued.
	PropAsync = "async"
	// PropCheckedRemoval: a member is only removed after a check of its own.
	PropCheckedRemoval = "checked-removal"
	// PropEncryption: bodies cannot be read on the wire.
	PropEncryption = "encryption"
)

// UnmarkedTransforms stands, in Descriptor.Above and Below, for all layers that
// change every message without marking it by a flag. What such a layer's
// counterpart receives unchanged it misreads, so a layer that talks to its
// peers directly must stand below all of them.
const UnmarkedTransforms = "*unmarked-transforms"

// Layer is one entry of a stack's configuration.
type Layer struct {
	Interceptor Interceptor
	// Origin is where the layer was configured, "server.yaml:12", for error
	// messages; empty when it came from code.
	Origin string
}

// Stack is an ordered, validated list of layers, the first nearest to the
// application. It is immutable. Its layers may keep state, so a Stack serves
// exactly one Channel.
type Stack struct {
	layers  []layer // top first
	mutates bool    // a layer changes bodies
	used    atomic.Bool
}

// layer is what was discovered about one interceptor.
type layer struct {
	Interceptor
	desc   Descriptor
	origin string

	send    SendHandler
	receive ReceiveHandler
	encode  Encoder
	decode  Decoder
	member  MemberHandler
	tick    TickHandler
	filter  ViewFilter
	start   Starter
	stop    Stopper
}

// NewStack builds a stack and checks it as a whole. The error joins one
// sentence for every broken rule.
func NewStack(layers ...Layer) (*Stack, error) {
	s := &Stack{layers: make([]layer, 0, len(layers))}
	var errs []error
	for i, l := range layers {
		if l.Interceptor == nil {
			errs = append(errs, fmt.Errorf("channel: stack: layer %d%s has no interceptor", i+1, at(l.Origin)))
			continue
		}
		s.layers = append(s.layers, discover(l))
	}
	for i := range s.layers {
		errs = append(errs, s.checkAlone(i)...)
		errs = append(errs, s.checkPlace(i)...)
		errs = append(errs, s.checkFlags(i)...)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	s.mutates = slices.ContainsFunc(s.layers, func(l layer) bool { return l.desc.Mutates })
	return s, nil
}

func discover(l Layer) layer {
	x := layer{Interceptor: l.Interceptor, desc: l.Interceptor.Descriptor(), origin: l.Origin}
	x.send, _ = l.Interceptor.(SendHandler)
	x.receive, _ = l.Interceptor.(ReceiveHandler)
	x.encode, _ = l.Interceptor.(Encoder)
	x.decode, _ = l.Interceptor.(Decoder)
	x.member, _ = l.Interceptor.(MemberHandler)
	x.tick, _ = l.Interceptor.(TickHandler)
	x.filter, _ = l.Interceptor.(ViewFilter)
	x.start, _ = l.Interceptor.(Starter)
	x.stop, _ = l.Interceptor.(Stopper)
	return x
}

func at(origin string) string {
	if origin == "" {
		return ""
	}
	return " (" + origin + ")"
}

func (l *layer) title() string { return fmt.Sprintf("%q%s", l.desc.Name, at(l.origin)) }

func (l *layer) handles() []string {
	var h []string
	add := func(has bool, word string) {
		if has {
			h = append(h, word)
		}
	}
	add(l.send != nil || l.encode != nil, "send")
	add(l.receive != nil || l.decode != nil, "receive")
	add(l.member != nil, "member")
	add(l.filter != nil, "view")
	add(l.tick != nil, "tick")
	return h
}

func ruleError(format string, args ...any) error {
	return fmt.Errorf("channel: stack: "+format, args...)
}

// checkAlone checks what concerns the layer itself.
func (s *Stack) checkAlone(i int) (errs []error) {
	l := &s.layers[i]
	fail := func(format string, args ...any) { errs = append(errs, ruleError(format, args...)) }
	if l.desc.Name == "" {
		fail("layer %d%s (%T) has no name in its descriptor", i+1, at(l.origin), l.Interceptor)
	}
	if l.send != nil && l.encode != nil {
		fail("%s implements both SendHandler and Encoder: implement one of them", l.title())
	}
	if l.receive != nil && l.decode != nil {
		fail("%s implements both ReceiveHandler and Decoder: implement one of them", l.title())
	}
	if len(l.handles()) == 0 && l.start == nil {
		fail("%s handles nothing: implement at least one of the handler interfaces", l.title())
	}
	down, up := l.send != nil || l.encode != nil, l.receive != nil || l.decode != nil
	if l.desc.Mutates && down != up {
		fail("%s changes messages in one direction only: it must undo on the way up what it does on the way down", l.title())
	}
	if own := l.desc.Flag & (ByteMessage | UseAck | SyncAck); own != 0 {
		fail("%s uses the option flag 0x%x, but the bits %s belong to the channel itself", l.title(), uint32(l.desc.Flag), own)
	}
	if strings.Contains(l.desc.Name, "/") && l.desc.Flag != 0 && (l.desc.Flag < ThirdPartyMin || l.desc.Flag >= ThirdPartyMax<<1 || l.desc.Flag&(ThirdPartyMin-1) != 0) {
		fail("%s uses the option flag 0x%x, but third-party layers must use bits from 0x%x to 0x%x", l.title(), uint32(l.desc.Flag), uint32(ThirdPartyMin), uint32(ThirdPartyMax))
	}
	return errs
}

// checkPlace checks above, below and requires of one layer.
func (s *Stack) checkPlace(i int) (errs []error) {
	l := &s.layers[i]
	for j := range s.layers {
		o := &s.layers[j]
		if j > i && o.named(l.desc.Below) {
			errs = append(errs, ruleError("%s must stand below %s, but is listed above it: move %q further down the list", l.title(), o.title(), l.desc.Name))
		}
		if j < i && o.named(l.desc.Above) {
			errs = append(errs, ruleError("%s must stand above %s, but is listed below it: move %q further up the list", l.title(), o.title(), l.desc.Name))
		}
	}
	for _, need := range l.desc.Requires {
		if slices.ContainsFunc(s.layers[i+1:], func(o layer) bool { return slices.Contains(o.desc.Provides, need) }) {
			continue
		}
		above := slices.IndexFunc(s.layers[:i], func(o layer) bool { return slices.Contains(o.desc.Provides, need) })
		if above >= 0 {
			errs = append(errs, ruleError("%s requires %q below it, but %s, which provides it, is listed above it", l.title(), need, s.layers[above].title()))
		} else {
			errs = append(errs, ruleError("%s requires %q, but no layer below it provides that", l.title(), need))
		}
	}
	return errs
}

// named reports whether l is meant by one of the names.
func (l *layer) named(names []string) bool {
	return slices.Contains(names, l.desc.Name) ||
		l.desc.Mutates && l.desc.Flag == 0 && slices.Contains(names, UnmarkedTransforms)
}

// checkFlags compares the flag of layer i with those of the layers below it.
func (s *Stack) checkFlags(i int) (errs []error) {
	l := &s.layers[i]
	for j := i + 1; j < len(s.layers); j++ {
		o := &s.layers[j]
		if common := l.desc.Flag & o.desc.Flag; common != 0 {
			errs = append(errs, ruleError("%s and %s use the same option flag (0x%x): give one of them another flag, or remove it", l.title(), o.title(), uint32(common)))
		}
	}
	return errs
}

// LayerInfo describes one layer, for people and for JSON.
type LayerInfo struct {
	Name    string   `json:"name"`
	Origin  string   `json:"origin,omitempty"`
	Handles []string `json:"handles"`
	Flag    Options  `json:"flag,omitempty"`
	Mutates bool     `json:"mutates,omitempty"`
	Promise string   `json:"promise,omitempty"`
}

// Layers describes all layers, nearest to the application first.
func (s *Stack) Layers() []LayerInfo {
	out := make([]LayerInfo, len(s.layers))
	for i := range s.layers {
		l := &s.layers[i]
		out[i] = LayerInfo{l.desc.Name, l.origin, l.handles(), l.desc.Flag, l.desc.Mutates, l.desc.Promise}
	}
	return out
}

// maxFingerprint is the length in bytes up to which a fingerprint is readable;
// longer ones are hashed.
const maxFingerprint = 64

// Fingerprint identifies the layers that change messages, in their order; it is
// empty when there are none. Nodes with different fingerprints cannot read each
// other's messages.
func (s *Stack) Fingerprint() string {
	var parts []string
	for i := range s.layers {
		d := &s.layers[i].desc
		if d.Mutates {
			parts = append(parts, fmt.Sprintf("%s:%x", d.Name, uint32(d.Flag)))
		}
	}
	f := strings.Join(parts, ",")
	if len(f) > maxFingerprint {
		sum := sha256.Sum256([]byte(f))
		f = "sha256:" + hex.EncodeToString(sum[:16])
	}
	return f
}

func (s *Stack) provider(prop string) *layer {
	for i := range s.layers {
		if slices.Contains(s.layers[i].desc.Provides, prop) {
			return &s.layers[i]
		}
	}
	return nil
}

// localID returns the identity that the first Identifier gives this node.
func (s *Stack) localID() UniqueID {
	for i := range s.layers {
		if x, ok := s.layers[i].Interceptor.(Identifier); ok && !x.LocalID().IsZero() {
			return x.LocalID()
		}
	}
	return UniqueID{}
}

// Warnings says, one sentence each, which layers miss others that they should
// be used with, see Descriptor.Wants.
func (s *Stack) Warnings() (list []string) {
	for i := range s.layers {
		l := &s.layers[i]
		for _, want := range l.desc.Wants {
			if !slices.ContainsFunc(s.layers, func(o layer) bool { return o.desc.Name == want }) {
				list = append(list, fmt.Sprintf("%s should be used with %q, which is not in the stack: add it, or see the documentation of %q for what is missing without it", l.title(), want, l.desc.Name))
			}
		}
	}
	return list
}

// warn logs the warnings.
func (s *Stack) warn(log *zap.Logger) {
	for _, w := range s.Warnings() {
		log.Warn("the stack lacks a layer", zap.String("what", w))
	}
}

// Explain draws the stack as a table, top first, and says in words what it
// promises.
func (s *Stack) Explain() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "LAYER\tHANDLES\tFLAG\tCHANGES BODIES\tCONFIGURED\tPROMISE")
	fmt.Fprintln(w, "application\t\t\t\t\t")
	for i := range s.layers {
		l := &s.layers[i]
		flag, mutates := "-", "no"
		if l.desc.Flag != 0 {
			flag = fmt.Sprintf("0x%x", uint32(l.desc.Flag))
		}
		if l.desc.Mutates {
			mutates = "yes"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", l.desc.Name, strings.Join(l.handles(), "+"), flag, mutates, cmpOr(l.origin, "in code"), l.desc.Promise)
	}
	fmt.Fprintln(w, "coordinator\tsend+receive+member\t0x7\tno\tbuilt in\tsender, receiver, membership, suppression of duplicates")
	w.Flush()
	lines := strings.Split(b.String(), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	b.Reset()
	b.WriteString(strings.Join(lines, "\n"))
	b.WriteString("\nThis stack promises:\n")
	for _, p := range s.promises() {
		b.WriteString("- " + p + "\n")
	}
	for _, w := range s.Warnings() {
		b.WriteString("Warning: " + w + "\n")
	}
	return b.String()
}

func cmpOr(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func (s *Stack) promises() []string {
	p := []string{"Delivery: a message that waits for an acknowledgement is delivered at most once to each receiver, also when it is sent again. " +
		"With \"sync\" success means that every addressed member has processed it, with \"ack\" that it has received it, otherwise only that it was written."}

	switch total, order := s.provider(PropTotalOrder), s.provider(PropOrder); {
	case total != nil:
		p = append(p, fmt.Sprintf("Order: all members see all messages in one order (%s).", total.desc.Name))
	case order != nil:
		p = append(p, fmt.Sprintf("Order: the messages of one sender arrive in the order in which they were sent (%s).", order.desc.Name))
	default:
		p = append(p, "Order: messages of one sender to a member that announces pipelining arrive in the order in which they were sent; to other members, Tomcat among them, they may overtake each other. There is no order between senders.")
	}

	if q := s.provider(PropAsync); q != nil {
		p = append(p, fmt.Sprintf("Loss when one node dies: asynchronous messages that the dead node still had in its queue (%s) or on the wire are lost; messages whose acknowledgement its sender has seen are not.", q.desc.Name))
	} else {
		p = append(p, "Loss when one node dies: messages on the wire without an acknowledgement. Nothing is queued: a message with the option async is sent by the caller itself, because no layer queues it.")
	}

	if c := s.provider(PropCheckedRemoval); c != nil {
		p = append(p, fmt.Sprintf("Failure of a member: it is removed when its heartbeats stop or a send fails and it then also fails its own check (%s); while the check is answered it stays.", c.desc.Name))
	} else {
		p = append(p, "Failure of a member: it is removed as soon as its heartbeats stop, even if it could still be reached; a failed send alone removes nobody.")
	}
	p = append(p, "In a split: each side goes on with the members it can reach, none stops by itself; when the split heals, the members find each other again and the views become equal.")

	if e := s.provider(PropEncryption); e != nil {
		p = append(p, fmt.Sprintf("Secrecy: bodies are encrypted (%s); member records, options and sizes are not.", e.desc.Name))
	} else {
		p = append(p, "Secrecy: none; anybody on the network can read and forge messages.")
	}
	if f := s.Fingerprint(); f != "" {
		p = append(p, fmt.Sprintf("Compatibility: only nodes with the same changing layers in the same order understand each other (fingerprint %s).", f))
	} else {
		p = append(p, "Compatibility: no layer changes bodies, so any Tribes node understands the messages.")
	}
	return p
}
