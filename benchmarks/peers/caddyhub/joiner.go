package main

import (
	"bufio"
	"errors"
	"net"
	"net/http"
	"sync"

	"github.com/gorilla/websocket"
)

// hijacker finds the connection below Caddy's wrappers, where gorilla/websocket does not look for it.
type hijacker struct {
	http.ResponseWriter
	joined bool
}

func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	connection, buffers, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err == nil && h.joined {
		connection = &joiner{Conn: connection}
	}
	return connection, buffers, err
}

// joiner is a connection that can hold back what is written, to write all of it at once.
type joiner struct {
	net.Conn
	lock sync.Mutex // the goroutine that reads writes too: it answers pings
	held *[]byte    // nil unless writes are held back
}

// Clients that wait for nothing hold no buffer.
var spare = sync.Pool{New: func() any { return new([]byte) }}

func (j *joiner) Write(bytes []byte) (int, error) {
	j.lock.Lock()
	defer j.lock.Unlock()
	if j.held == nil {
		return j.Conn.Write(bytes)
	}
	*j.held = append(*j.held, bytes...)
	return len(bytes), nil
}

// hold holds back what is written from now on.
func (j *joiner) hold() {
	j.lock.Lock()
	defer j.lock.Unlock()
	j.held = spare.Get().(*[]byte)
}

// release writes what was held back.
func (j *joiner) release() error {
	j.lock.Lock()
	defer j.lock.Unlock()
	held := j.held
	j.held = nil
	_, err := j.Conn.Write(*held)
	*held = (*held)[:0]
	spare.Put(held)
	return err
}

// send writes a message and, if the hub joins them, those that wait behind it.
func (c *client) send(content []byte) error {
	waiting := len(c.queue)
	if c.joiner == nil || waiting == 0 {
		return c.connection.WriteMessage(websocket.TextMessage, content)
	}
	c.joiner.hold()
	err := c.connection.WriteMessage(websocket.TextMessage, content)
	for ; waiting > 0 && err == nil; waiting-- {
		next, open := <-c.queue
		if !open {
			break // the goroutine that writes sees that again
		}
		err = c.connection.WriteMessage(websocket.TextMessage, next)
	}
	return errors.Join(err, c.joiner.release())
}
