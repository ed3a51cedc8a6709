package staticservice

import (
	"errors"
	"fmt"
	"time"
)

// Bounds of what this node keeps and does at a time.
const (
	// maxConfigured bounds Config.Members.
	maxConfigured = 1024
	// maxMembers bounds the members, configured or not.
	maxMembers = 4096
	// maxReplies bounds the replies that are being sent.
	maxReplies = 64
	// maxBody bounds a message of this protocol, in bytes: a member record has
	// at most 64 KiB.
	maxBody = 128 << 10
)

// Config is what a user says about the membership.
type Config struct {
	// Channel is the name of the channel on all nodes.
	Channel string `yaml:"channel"`
	// Members are the nodes of the group; this node may be among them.
	Members []Member `yaml:"members"`
	// PingInterval is the time between two requests to a member.
	PingInterval time.Duration `yaml:"ping_interval"`
	// Expiration is the silence after which a member is lost.
	Expiration time.Duration `yaml:"expiration"`
	// Timeout bounds a request, from connecting to its reply.
	Timeout time.Duration `yaml:"timeout"`
	// MaxRetry bounds the pauses between attempts to reach a member that is not
	// there; they double, from PingInterval on. One that comes is seen at once.
	MaxRetry time.Duration `yaml:"max_retry"`
}

// Member is one configured node.
type Member struct {
	// Host is an address or a name of it.
	Host string `yaml:"host"`
	// Port is that of its receiver.
	Port int `yaml:"port"`
}

// Default returns the settings of Tomcat; Channel and Members must be set by
// the user.
func Default() Config {
	return Config{PingInterval: time.Second, Expiration: 5 * time.Second, Timeout: 3 * time.Second, MaxRetry: 10 * time.Second}
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf("staticservice: "+format, args...)) }
	if c.Channel == "" {
		fail("channel: is empty; write the name of the channel, in Tomcat it is <cluster name>-Channel")
	}
	if len(c.Members) == 0 {
		fail("members: none are listed")
	}
	if len(c.Members) > maxConfigured {
		fail("members: %d are listed, the most is %d", len(c.Members), maxConfigured)
	}
	seen := map[Member]bool{}
	for i, m := range c.Members {
		switch {
		case m.Host == "":
			fail("members[%d]: host: is empty", i)
		case m.Port < 1 || m.Port > 65535:
			fail("members[%d]: port: %d is outside 1..65535", i, m.Port)
		case seen[m]:
			fail("members[%d]: %s:%d is listed twice", i, m.Host, m.Port)
		}
		seen[m] = true
	}
	for name, d := range map[string]time.Duration{"ping_interval": c.PingInterval, "timeout": c.Timeout, "max_retry": c.MaxRetry} {
		if d < 10*time.Millisecond {
			fail("%s: %v is less than 10ms", name, d)
		}
	}
	if c.Expiration < 2*c.PingInterval {
		fail("expiration: %v is less than two ping intervals: a member would be lost between two pings", c.Expiration)
	}
	return errors.Join(errs...)
}
