package staticmember

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// maxMembers bounds the list of members.
const maxMembers = 1024

// Member is one node of the list.
type Member struct {
	// Host is its address or host name.
	Host string `yaml:"host"`
	// Port is the TCP port of its receiver.
	Port int `yaml:"port"`
	// SecurePort and UDPPort are the ports it announces; 0 for none.
	SecurePort int `yaml:"secure_port"`
	UDPPort    int `yaml:"udp_port"`
	// Domain is its logical group, as text or as a list of bytes: "{97,-28}".
	Domain string `yaml:"domain"`
	// UniqueID is its identity: 16 bytes as a list of signed bytes in braces,
	// as Tomcat writes them, or as 32 hexadecimal digits. Without one it is
	// learnt from the node's own notification.
	UniqueID string `yaml:"unique_id"`
	// Payload is carried in its record, as text or as a list of bytes. It is
	// replaced by what the node says of itself.
	Payload string `yaml:"payload"`
}

// Local is what the other nodes have in their lists about this one.
type Local struct {
	// Host and Port are compared with what this node announces, if set.
	Host string `yaml:"host"`
	Port int    `yaml:"port"`
	// UniqueID becomes the identity of this node.
	UniqueID string `yaml:"unique_id"`
}

// Config is what a user writes.
type Config struct {
	// Members are the nodes of the group. This node may be among them, so that
	// all nodes can share one list.
	Members []Member `yaml:"members"`
	// Local is this node.
	Local Local `yaml:"local"`
	// Timeout bounds the attempt to reach a member.
	Timeout time.Duration `yaml:"timeout"`
	// MinRetry and MaxRetry bound the time between two attempts to reach a
	// member that does not answer; it doubles with every one.
	MinRetry time.Duration `yaml:"min_retry"`
	MaxRetry time.Duration `yaml:"max_retry"`
}

// Defaults list nobody.
var Defaults = Config{Timeout: 3 * time.Second, MinRetry: time.Second, MaxRetry: 30 * time.Second}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("staticmember: "+format, args...))
	}
	if len(c.Members) > maxMembers {
		fail("members: %d are listed, the most is %d", len(c.Members), maxMembers)
	}
	ids, addrs := map[channel.UniqueID]int{}, map[string]int{}
	for i, m := range c.Members {
		where := fmt.Sprintf("members[%d] (%s:%d)", i, m.Host, m.Port)
		if m.Host == "" {
			fail("%s: host is missing", where)
		}
		if m.Port < 1 || m.Port > 65535 {
			fail("%s: port is %d, must be 1 to 65535", where, m.Port)
		}
		for name, p := range map[string]int{"secure_port": m.SecurePort, "udp_port": m.UDPPort} {
			if p < -1 || p > 65535 {
				fail("%s: %s is %d, must be 1 to 65535, or 0 or -1 for none", where, name, p)
			}
		}
		for name, text := range map[string]string{"domain": m.Domain, "payload": m.Payload} {
			if b, err := parseBytes(text); err != nil {
				fail("%s: %s: %w", where, name, err)
			} else if len(b) > 32<<10 {
				fail("%s: %s has %d bytes, the most is %d", where, name, len(b), 32<<10)
			}
		}
		id, err := parseID(m.UniqueID)
		if err != nil {
			fail("%s: %w", where, err)
		}
		if j, dup := ids[id]; dup && !id.IsZero() {
			fail("%s has the same unique_id as members[%d] (%s:%d): give each node one of its own", where, j, c.Members[j].Host, c.Members[j].Port)
		}
		ids[id] = i
		addr := fmt.Sprintf("%s:%d", strings.ToLower(m.Host), m.Port)
		if j, dup := addrs[addr]; dup {
			fail("%s is listed twice: it is members[%d] too", where, j)
		}
		addrs[addr] = i
	}
	if _, err := parseID(c.Local.UniqueID); err != nil {
		fail("local: %w", err)
	}
	if c.Local.Port < 0 || c.Local.Port > 65535 {
		fail("local: port is %d, must be 1 to 65535, or 0 when it is not to be compared", c.Local.Port)
	}
	if c.Timeout <= 0 {
		fail("timeout is %v, must be positive", c.Timeout)
	}
	if c.MinRetry < 10*time.Millisecond {
		fail("min_retry is %v, must be at least 10ms", c.MinRetry)
	}
	if c.MaxRetry < c.MinRetry {
		fail("max_retry is %v, must not be less than min_retry (%v)", c.MaxRetry, c.MinRetry)
	}
	return errors.Join(errs...)
}

// localID returns the identity that the configuration gives this node: that of
// local, or that of the member with local's address.
func (c *Config) localID() channel.UniqueID {
	if id, _ := parseID(c.Local.UniqueID); !id.IsZero() {
		return id
	}
	for _, m := range c.Members {
		if c.Local.Host != "" && m.Host == c.Local.Host && m.Port == c.Local.Port {
			id, _ := parseID(m.UniqueID)
			return id
		}
	}
	return channel.UniqueID{}
}

// record is what the configuration says of a member, but for its host.
func (m *Member) record() channel.Member {
	port := func(p int) int {
		if p == 0 {
			return -1
		}
		return p
	}
	id, _ := parseID(m.UniqueID)
	domain, _ := parseBytes(m.Domain)
	payload, _ := parseBytes(m.Payload)
	r := channel.Member{ID: id, Port: m.Port, SecurePort: port(m.SecurePort), UDPPort: port(m.UDPPort), Domain: string(domain), Payload: string(payload)}
	if a, err := netip.ParseAddr(m.Host); err == nil {
		r.Host = a.Unmap()
	}
	return r
}

var errID = errors.New("unique_id must be 16 bytes, as a list of signed bytes ({0,-1,2,…}) or as 32 hexadecimal digits")

// parseID reads an identity. The empty text, and sixteen zeros (Tomcat's
// default), are the zero id.
func parseID(text string) (id channel.UniqueID, err error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return id, nil
	}
	var b []byte
	if strings.HasPrefix(text, "{") {
		if b, err = parseBytes(text); err != nil {
			return id, fmt.Errorf("unique_id: %w", err)
		}
	} else if b, err = hex.DecodeString(strings.ReplaceAll(text, "-", "")); err != nil {
		return id, errID
	}
	if len(b) != len(id) {
		return id, fmt.Errorf("%w; it has %d bytes", errID, len(b))
	}
	return channel.UniqueID(b), nil
}

// parseBytes reads text, or a list of bytes in braces. Tomcat takes bytes from
// -128 to 127; unsigned ones are understood too.
func parseBytes(text string) ([]byte, error) {
	list, ok := strings.CutPrefix(strings.TrimSpace(text), "{")
	if !ok {
		return []byte(text), nil
	}
	if list, ok = strings.CutSuffix(list, "}"); !ok {
		return nil, errors.New("the list of bytes has no closing brace")
	}
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}
	parts := strings.Split(list, ",")
	b := make([]byte, len(parts))
	for i, p := range parts {
		n, err := strconv.ParseInt(strings.TrimSpace(p), 10, 16)
		if err != nil || n < -128 || n > 255 {
			return nil, fmt.Errorf("byte %d of the list is %q, must be -128 to 255", i+1, strings.TrimSpace(p))
		}
		b[i] = byte(n)
	}
	return b, nil
}
